"""One engine and one server for all tests of HTTP in a process. Without the `serve` extra there are no such tests."""

import time
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


@pytest.fixture
def slowly(served, monkeypatch):
    """The engine takes its time, so that a sender who goes away is in the middle of an answer for sure."""
    step = served.engine.step
    monkeypatch.setattr(served.engine, "step", lambda: time.sleep(0.2) or step())
