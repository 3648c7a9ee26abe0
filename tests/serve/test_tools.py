"""Tool calls are found in text however it is cut, and nothing else is lost or changed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.tools import Call, ToolCalls

SCHEMAS = {
    "f": {
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "on": {"type": "boolean"},
            "list": {"type": "array"},
            "maybe": {"type": ["string", "null"]},
            "any": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        }
    }
}
JSON = '<tool_call>\n{"name": "f", "arguments": {"text": "a\\n</x>", "count": 3}}\n</tool_call>'
TAGS = "<tool_call>\n<function=f>\n<parameter=text>\ndef g():\n    return 1\n\n</parameter>\n</function>\n</tool_call>"


def parse(*pieces: str) -> list:
    calls = ToolCalls(SCHEMAS)
    found = [item for piece in pieces for item in calls.push(piece)] + calls.flush()
    joined: list = []
    for item in found:  # texts in a row are one text
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    return joined


def test_both_formats():
    assert parse(f"Hello.\n\n{JSON}\n{TAGS}\n") == [
        "Hello.",
        Call("f", '{"text": "a\\n</x>", "count": 3}'),
        Call("f", '{"text": "def g():\\n    return 1\\n"}'),
    ]


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("text", "12", "12"), ("text", "\n x \n", " x "), ("text", "", ""), ("count", "12", 12), ("count", "\n 7\n", 7),
        ("count", "twelve", "twelve"), ("on", "True", True), ("on", "false", False), ("list", '["a", 1]', ["a", 1]),
        ("maybe", "null", None), ("maybe", "5", "5"), ("any", "5", 5), ("any", "None", None), ("unknown", "5", "5"),
        ("text", "<b>é</b>", "<b>é</b>"),
    ],
)  # fmt: skip
def test_values_have_the_types_of_the_schema(key, written, value):
    (call,) = parse(f"<tool_call><function=f><parameter={key}>{written}</parameter></function></tool_call>")
    assert json.loads(call.arguments) == {key: value}


def test_functions_without_arguments_or_schema():
    assert parse("<tool_call><function=g></function></tool_call>") == [Call("g", "{}")]
    assert parse('<tool_call>{"name": "g"}</tool_call>') == [Call("g", "{}")]
    assert parse('<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>') == [Call("g", '{"a": 1}')]


@pytest.mark.parametrize(
    "text",
    [
        "no call", " spaces \n", "<tool_call>", "<tool_", "a <tool_call> b </tool_call> c", "<tool_call>{</tool_call>",
        '<tool_call>{"name": 3}</tool_call>', "<tool_call>[1]</tool_call>", "x\n<tool_call>\n<function=f>",
        "<tool_call><function=f><parameter=a>1</parameter></tool_call>", "</tool_call> x", "<<tool_call",
    ],
)  # fmt: skip
def test_what_is_no_call_stays_text(text):
    assert parse(text) == [text]


def test_text_after_a_call_comes_too():
    assert parse(f"{JSON}\n\nDone. ") == [parse(JSON)[0], "\n\nDone. "]


def test_text_does_not_wait_for_the_end():
    calls = ToolCalls({})
    assert calls.push("Hello, ") == ["Hello,"]
    assert calls.push("world <") == [" world"]
    assert calls.push("b> <tool_call") == [" <b>"]
    assert calls.push("ed") == [" <tool_called"]


@given(
    parts=st.lists(st.sampled_from([JSON, TAGS, "Hi", "\n", " <", "<tool_call>", "</tool_call>", "é"]), max_size=6),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_cutting_changes_nothing(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(*pieces) == parse(text)
    calls = [item for item in parse(text) if isinstance(item, Call)]
    if not calls:
        assert parse(text) == ([text] if text else [])
