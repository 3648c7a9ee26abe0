"""What one sender does wrong is told in one line, and changes nothing for the others."""

import http.client
import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dflash_jax
from serve.api.server import Server, answer
from serve.requests import Request
from tests.serve import servers
from tests.serve.servers import MODEL

OK = {"model": MODEL, "prompt": "x", "max_tokens": 3, "temperature": 0}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "f", "strict": True}}


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
    assert error["type"] == ("server_error" if response.status_code >= 500 else error["type"])
    return error


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"{", JSON, 400, "cannot be read.*JSON"),
        (b"", JSON, 400, "cannot be read.*JSON"),
        (b"[]", JSON, 400, "should be an object"),
        (b'{"prompt": "\xff"}', JSON, 400, "cannot be read"),
        (b'{"prompt": "\\ud800"}', JSON, 400, "hex escape"),
        (b"[" * 100_000, JSON, 400, "recursion"),
        (b'{"prompt": "x", "temperature": NaN}', JSON, 400, "temperature.*finite"),
        (b'{"prompt": "x", "seed": 1e400}', JSON, 400, "seed"),
        (b'{"prompt": "x"}', {"Content-Type": "text/plain"}, 415, "text/plain; send JSON"),
        (b'{"prompt": "x"}', {}, 415, "application/json"),
    ],
)
def test_bodies_that_are_no_json(client, content, headers, status, message):
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == status
    assert re.search(message, error_of(response)["message"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "prompt: give a text"),
        ({"prompt": []}, "prompt: give a text"),
        ({"prompt": [1, "x"]}, "prompt: give a text"),
        ({"prompt": [True]}, "prompt: give a text"),
        ({"prompt": [[]]}, "prompt: give a text"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [384]}, "token id 384 is outside"),
        ({"prompt": [-1], "echo": True}, "token id -1 is outside"),
        ({"prompt": "x y " * 600}, "has 2400 tokens; the maximum context length is 512, give at most 511"),
        ({"prompt": [[1]] * 5000}, "5000 requests.*at most 4096"),
        ({"max_tokens": -1}, "max_new_tokens is -1"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs are not told in a stream"),
        ({"prompt_logprobs": 6}, "prompt_logprobs is 6; this engine names at most 5"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"max_tokens": "many"}, "max_tokens: Input should be a valid integer, not 'many'"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number, not 'hot'"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"n": 0}, "n: Input should be greater"),
        ({"n": 129}, "n: Input should be less"),
        ({"best_of": 1, "n": 2}, "best_of is 1, and n 2"),
        ({"best_of": 3, "stream": True}, "best_of is more than n"),
        ({"n": 1.5}, "n: Input should be a valid integer"),
        ({"skip_special_tokens": False}, "skip_special_tokens is 'False', and this server knows only true"),
        ({"bad_words": ["several tokens"]}, "bad_words has 'several tokens', which is . tokens"),
        ({"ebnf": "root ::= ((("}, "ebnf is no grammar in GBNF"),
        ({"ebnf": "root ::= " + "(" * 9999}, "ebnf is no grammar in GBNF"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "regex and ebnf were both given"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [5000]}, "cannot be used"),
        ({"top_k": -2}, "top_k is -2"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, "without stream"),
        ({"stop": ["a"] * 17}, "stop: .* at most 16"),
        ({"stop": "a" * 257}, "stop strings have 1 to 256"),
        ({"stop": ""}, "stop strings have 1 to 256"),
        ({"logit_bias": {"a": 1}}, "keys are token ids"),
        ({"logit_bias": {"5000": 1}}, "names token 5000"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias: .* at most 1024"),
        ({"suffix": "end"}, "suffix is 'end'"),
        ({"mirostat": 2, "typical_p": 0.5}, "does not know mirostat, typical_p"),
        ({"stop_token_ids": list(range(100))}, "stop ids"),
        ({"logprobs": 6}, "logprobs is 6; this engine names at most 5"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"min_tokens": -3}, "min_tokens"),
        ({"min_tokens": 30, "max_tokens": 3}, "min_tokens is 30, and max_new_tokens 3"),
        ({"structured_outputs": {"regex": "(", }}, "grammar .regex. cannot be used"),
        ({"structured_outputs": {"regex": "a", "json": "{}"}}, "has json, regex; give just one of"),
        ({"structured_outputs": {"choice": []}}, "no list of texts"),
    ],
)  # fmt: skip
def test_completions_that_cannot_be(client, changes, message):
    response = client.post("/v1/completions", json=OK | changes)
    assert response.status_code == 400
    assert re.search(message, error_of(response)["message"]), response.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "messages: .* at least 1"),
        ({"messages": [{"content": "x"}]}, "messages.0.role: Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'text', not 'image_url'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function":
            {"name": "f", "arguments": "no"}}]}]}, "chat template .* refuses"),
        ({"chat_template_kwargs": {"tools": []}}, "tools cannot be given here"),
        ({"functions": [{"name": "f"}]}, r"functions is .*, and this server knows only \[\]"),
        ({"reasoning_effort": 3}, "reasoning_effort: Input should be a valid string"),
        ({"tools": [{"type": "magic"}]}, "tools.0.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{"function":
            {"name": "g"}}]}}}, "tool_choice.allowed_tools needs the mode"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools is not understood"),
        ({"tool_choice": "required"}, "tool_choice is required, and there are no tools"),
        ({"tool_choice": {"name": "f"}}, "tool_choice is {'name': 'f'}; give auto, none, required"),
        ({"tools": [TOOL | {"function": {"name": "f", "parameters": {"type": "strin"}}}], "tool_choice": "required"},
            "the grammar .lark. cannot be used"),
        ({"top_logprobs": 2}, "without logprobs: true"),
        ({"response_format": {"type": "yaml"}}, "has the type 'yaml'; give one of text, json_object"),
        ({"response_format": {"type": "json_schema"}}, "has no json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "both given"),
    ],
)  # fmt: skip
def test_chats_that_cannot_be(client, changes, message):
    response = client.post("/v1/chat/completions", json=CHAT | changes)
    assert response.status_code == 400
    assert re.search(message, error_of(response)["message"]), response.text


def test_what_changes_nothing_is_taken(client):
    more = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "suffix": None,
        "mirostat": None,
    }
    more |= {"logprobs": None, "best_of": 1, "prediction": {"type": "content", "content": "x"}}
    assert client.post("/v1/completions", json=OK | more).status_code == 200
    more = {"logprobs": False, "response_format": {"type": "text"}, "tool_choice": "auto", "modalities": ["text"]}
    assert client.post("/v1/chat/completions", json=CHAT | more).status_code == 200
    del more["modalities"]
    without_model = {name: value for name, value in CHAT.items() if name != "model"}
    assert client.post("/v1/chat/completions", json=without_model | more).status_code == 200


def test_a_chat_with_a_model_that_cannot(served, client, monkeypatch):
    plain = replace(served.engine.pair, tokenizer=servers.without_template(served.tokenizer))
    monkeypatch.setattr(served.engine, "pair", plain)
    response = client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert "no chat template" in error_of(response)["message"]
    assert client.get("/v1/models").json()["data"][0]["dflash"]["chat"] is False


def test_wrong_places(client):
    response = client.post("/v1/completions", json=OK | {"model": "gpt-5"})
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert "'gpt-5'; this server has 'tiny'" in error_of(response)["message"]
    for response, status in [
        (client.get("/v1/nothing"), 404), (client.get("/v1/completions"), 405), (client.post("/", json={}), 405),
    ]:  # fmt: skip
        assert response.status_code == status
        error_of(response)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=5),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3), st.lists(st.text(max_size=3), max_size=3),
)  # fmt: skip
NAMES = (
    "model prompt stream stream_options n temperature top_p top_k min_p repetition_penalty presence_penalty logit_bias "
    "frequency_penalty seed stop stop_token_ids dflash logprobs echo suffix best_of messages tools tool_choice "
    "nonsense chat_template_kwargs response_format parallel_tool_calls"
)


@given(changes=st.dictionaries(st.sampled_from(NAMES.split()), VALUES, max_size=3), chat=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_breaks_the_server(client, changes, chat):
    path, body = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", OK)
    body = json.dumps({**body, "max_tokens": 2, **changes})
    response = client.post(path, content=body, headers=JSON)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error_of(response)


def test_keys_and_long_bodies(served):
    app = servers.make_app(served.engine, api_key="söcret", max_body_bytes=1000)
    with servers.listening(app) as url, httpx.Client(base_url=url) as client:
        right = {"Authorization": "Bearer söcret".encode()}
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "söcret".encode()}):
            for response in (
                client.get("/v1/models", headers=headers),
                client.post("/v1/completions", json=OK, headers=headers),
            ):
                assert response.status_code == 401
                assert error_of(response)["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.post("/v1/completions", json=OK, headers=right).status_code == 200
        assert [client.get(path).status_code for path in ("/health", "/metrics", "/")] == [200, 200, 200]
        long = json.dumps(OK | {"prompt": "x" * 2000}).encode()
        for content in (long, iter([long[:600], long[600:]])):  # with a length, and in chunks
            response = client.post("/v1/completions", content=content, headers=right | JSON)
            assert response.status_code == 413
            assert "takes 1000" in error_of(response)["message"]
        assert client.post("/v1/completions", json=OK, headers=right).status_code == 200


def test_a_full_queue_says_when_to_come_again(served, client, monkeypatch):
    served.wait_idle()
    monkeypatch.setattr(served.engine, "config", replace(served.engine.config, max_requests=2))
    waiting = [served.engine.submit(Request("x", max_new_tokens=400)) for _ in range(2)]
    response = client.post("/v1/completions", json=OK)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
    assert error_of(response)["type"] == "rate_limit_error"
    waiting[0].cancel()
    waiting[0].result()
    response = client.post("/v1/completions", json=OK | {"n": 2})  # one of them would fit
    assert response.status_code == 429
    waiting[1].cancel()
    served.wait_idle()
    assert client.post("/v1/completions", json=OK | {"n": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_who_is_still_served_at_the_end_is_told(served, capfd, stream):
    """The server is stopped in the middle of much work."""
    served.wait_idle()
    app = servers.make_app(served.engine)

    def ask(url: str) -> tuple[int, str]:
        body = OK | {"max_tokens": 480, "n": 40, "stream": stream, "temperature": 1.5}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            return response.status_code, [line for line in response.iter_lines() if line][-1]

    def stop() -> None:
        until = time.monotonic() + 30
        while served.engine.stats.unfinished < 40 and time.monotonic() < until:
            time.sleep(0.01)
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)

    with socket.create_server(("127.0.0.1", 0)) as sock, ThreadPoolExecutor(2) as pool:
        asked = pool.submit(ask, f"http://127.0.0.1:{sock.getsockname()[1]}")
        stopped = pool.submit(stop)
        answer(Server(app, 0.1, app.state.cancel), sock)
        stopped.result()
        status, line = asked.result()
    error = json.loads(line.removeprefix("data: "))["error"]
    assert status == (200 if stream else 503)
    assert (error["code"], error["type"]) == ("stopped", "server_error")
    assert capfd.readouterr() == ("", "")
    served.wait_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_leaves_nothing_behind(served, slowly, stream):
    served.wait_idle()
    before = served.engine.stats.cancelled
    body = json.dumps(OK | {"max_tokens": 480, "n": 3, "stream": stream})
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", body, JSON)
    if stream:
        response = connection.getresponse()
        assert response.status == 200
        response.read(200)
        response.close()
    else:
        until = time.monotonic() + 30
        while served.engine.stats.unfinished < 3:
            assert time.monotonic() < until
            time.sleep(0.005)
    connection.close()
    served.wait_idle()
    assert served.engine.stats.cancelled > before


def test_idle_connections_are_in_nobodys_way(served, client):
    """200 that say nothing, some after half a request."""
    address = served.url.removeprefix("http://").split(":")
    halves = [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
    ]
    idle = [socket.create_connection((address[0], int(address[1]))) for _ in range(200)]
    try:
        for i, connection in enumerate(idle):
            connection.sendall(halves[i % 3])
        expected = served.engine.submit(Request("def f(", max_new_tokens=30)).result().text
        body = OK | {"prompt": "def f(", "max_tokens": 30}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/completions", json=body).json(), range(8)))
        assert {answer["choices"][0]["text"] for answer in answers} == {expected}
    finally:
        for connection in idle:
            connection.close()
    served.wait_idle()
    assert client.get("/health").json()["status"] == "ok"


def test_a_bad_one_among_good_ones(served, client):
    """In the middle of streams, others are refused and cut off; the streams get what they get alone."""
    expected = served.engine.submit(Request("import ", max_new_tokens=120)).result().text

    def good(_: int) -> str:
        body = OK | {"prompt": "import ", "max_tokens": 120, "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
            return "".join(choice["text"] for event in servers.events(response) for choice in event["choices"])

    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(good, i) for i in range(3)]
        for _ in range(10):
            assert client.post("/v1/completions", content=b"{", headers=JSON).status_code == 400
            assert client.post("/v1/completions", json=OK | {"prompt": [9999]}).status_code == 400
            with httpx.stream(
                "POST", f"{served.url}/v1/completions", json=OK | {"max_tokens": 99, "stream": True}
            ) as r:
                next(r.iter_raw())
        assert [s.result() for s in streams] == [expected] * 3
    served.wait_idle()


def test_an_engine_that_has_failed(served, client, monkeypatch):
    monkeypatch.setattr(served.engine, "_error", RuntimeError("out of memory"))
    assert client.get("/health").status_code == 503
    response = client.post("/v1/completions", json=OK)
    assert response.status_code == 503
    assert "start the server again" in error_of(response)["message"]
    monkeypatch.undo()
    served.wait_idle()
    expected = {"status": "ok", "model": MODEL, "version": dflash_jax.__version__, "requests": 0}
    assert client.get("/health").json() == expected


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_fails_on_the_way(served, client, monkeypatch, stream):
    """Whoever waits hears of it: by the status, or where that is gone by an event."""
    submit = served.engine.submit

    def fail(request, deliver):
        handle = submit(request, lambda _: None)
        deliver(RuntimeError("the device is gone"))
        return handle

    monkeypatch.setattr(served.engine, "submit", fail)
    if stream:
        with client.stream("POST", "/v1/completions", json=OK | {"stream": True}) as response:
            (line,) = [line for line in response.iter_lines() if line]
        error = json.loads(line.removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
    else:
        response = client.post("/v1/completions", json=OK)
        assert response.status_code == 500
        error = error_of(response)
    assert "device is gone" not in error["message"]
    served.wait_idle()
