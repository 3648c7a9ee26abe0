"""No body gives a 500 or keeps others waiting, whatever is in it."""

import json
import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.api.schemas import ChatBody, CompletionBody
from serve.grammar import MOST_TEXT
from tests.serve.servers import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
HEADERS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


def chain(count):
    """A schema whose definitions name each other, one after the other."""
    links = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{count}": {"type": "string"}}}


def rules(count):
    return "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1} | "b"' for i in range(count)) + f'\nr{count}: "c"'


FORMS = {
    "62 deep": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": nested(62)}}},
    "90 deep": {"structured_outputs": {"json": nested(90)}},
    "deep text": {"structured_outputs": {"json": '{"items": ' * 5000 + "{}" + "}" * 5000}},
    "deep in a tool": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": nested(62), "strict": True}}]
    },
    "half a character": {"structured_outputs": {"json": '{"enum": ["\\ud83d"]}'}},
    "a chain": {"structured_outputs": {"json": chain(4000)}},
    "a chain of rules": {"structured_outputs": {"grammar": rules(8000)}},
    "a long text": {"structured_outputs": {"regex": "a" * (MOST_TEXT + 1)}},
    "parentheses": {"structured_outputs": {"regex": "(" * 9999 + ")" * 9999}},
}


@pytest.mark.parametrize("form", FORMS)
def test_grammars_that_go_deep_are_taken_or_refused(served, client, form):
    response = client.post("/v1/chat/completions", json=CHAT | FORMS[form])
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        message = response.json()["error"]["message"]
        assert "\n" not in message and len(message) < 500 and message.startswith("the ")
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("arguments", [r"{\"a\": \"\\ud83d\"}", "[" * 100_000, "1" * 5000, "NaN", r"{\"a\": 1e999}"])
def test_arguments_of_calls_that_no_template_can_write(client, arguments):
    text = (
        '{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"","tool_calls":[{"id":"1",'
        f'"type":"function","function":{{"name":"f","arguments":"{arguments}"}}}}]}}],"max_tokens":2}}'
    )
    response = client.post("/v1/chat/completions", content=text, headers=HEADERS)
    assert response.status_code in (200, 400), response.text
    assert "\n" not in response.text


def test_prompts_that_are_too_long_have_a_code_of_their_own(client):
    for path, body in (
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "x y " * 900}]}),
        ("/v1/completions", {"prompt": "x y " * 900}),
        ("/v1/completions", {"prompt": [5] * 512}),
    ):
        error = client.post(path, json=body).json()["error"]
        assert error["code"] == "context_length_exceeded" and "maximum context length is 512" in error["message"]


@pytest.mark.parametrize("kind", ["chat", "text", "ids"])
def test_a_long_prompt_keeps_nobody_waiting(served, client, kind):
    """It is refused by its length, before it is looked at."""
    body = {
        "chat": CHAT | {"messages": [{"role": "user", "content": "w" * 7_000_000}]},
        "text": {"prompt": "w" * 7_000_000},
        "ids": {"prompt": [5] * 2_500_000},
    }[kind]
    text, slowest, done = json.dumps(body).encode(), [0.0], threading.Event()

    def look():
        with httpx.Client(base_url=served.url) as other:
            while not done.is_set():
                since = time.monotonic()
                assert other.get("/health").status_code == 200
                slowest[0] = max(slowest[0], time.monotonic() - since)

    thread = threading.Thread(target=look)
    thread.start()
    since = time.monotonic()
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    response = client.post(path, content=text, headers=HEADERS)
    took = time.monotonic() - since
    done.set()
    thread.join()
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert slowest[0] < 1 and took < 5


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted({*ChatBody.model_fields, *CompletionBody.model_fields} - {"model", "stream"}))
SCHEMAS = st.fixed_dictionaries(
    {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": VALUES})}
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(FIELDS, VALUES, max_size=3), schema=st.none() | SCHEMAS, chat=st.booleans())
def test_no_body_gives_a_server_error(client, changes, schema, chat):
    path, body = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", {"prompt": "x", "max_tokens": 2})
    form = {} if schema is None else {"response_format": schema}
    text = json.dumps(body | form | changes | {"max_tokens": 2}).encode("utf-8", "surrogatepass")
    response = client.post(path, content=text, headers=HEADERS)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert "\n" not in response.json()["error"]["message"]
