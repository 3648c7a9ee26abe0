"""One engine and one server for all tests of HTTP in a process. Without the `serve` extra there are no such tests."""

from importlib.util import find_spec

import pytest

if find_spec("uvicorn") is None:
    collect_ignore_glob = ["test_api*.py", "test_page.py", "test_serve_command.py"]
else:

    @pytest.fixture(scope="session")
    def served(tmp_path_factory):
        from tests.serve import servers

        engine = servers.make_engine(tmp_path_factory.mktemp("tokenizer"))
        with engine, servers.listening(servers.make_app(engine)) as url:
            yield servers.Served(url, engine)
