"""Tool calls in a model's text, as Qwen's models write them.

    <tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>

and, from Qwen3-Coder and Qwen3.5 on,

    <tool_call><function=weather><parameter=city>Bonn</parameter></function></tool_call>

with line breaks around each part. What cannot be read as a call stays text.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

START, END = "<tool_call>", "</tool_call>"
FUNCTION = re.compile(r"<function=([^>\n]+)>")
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A call; the arguments are JSON in a text, as OpenAI has them."""

    name: str
    arguments: str


class ToolCalls:
    """Text in as it comes; text and calls out, each call when it is complete."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]):
        """`schemas`: the parameters of the functions by their names, for the types of values that are written bare."""
        self._schemas = schemas
        self._held = ""  # a call so far, or the end of the text that may be the start of one
        self._space = ""  # white space before what is held: dropped if a call follows
        self._inside = False
        self._called = False  # nothing but white space since a call

    def push(self, text: str) -> list[str | Call]:
        """What is certain now and was not before."""
        found: list[str | Call] = []
        self._held += text
        while True:
            if not self._inside:
                before, mark, rest = self._held.partition(START)
                if not mark:
                    return [*found, *self._text(before)]
                if before.strip():
                    found.append(self._space + before.rstrip())
                self._space = before[len(before.rstrip()) :] if before.strip() else self._space + before
                self._held, self._inside = rest, True
            body, mark, rest = self._held.partition(END)
            if not mark:
                return found
            call = self._read(body)
            found.append(f"{self._space}{START}{body}{END}" if call is None else call)
            self._called = call is not None
            self._held, self._inside, self._space = rest, False, ""

    def _text(self, text: str) -> list[str | Call]:
        """Keep the end of the text that may belong to a call."""
        size = next((n for n in range(len(START) - 1, 0, -1) if text.endswith(START[:n])), 0)
        certain, self._held = text[: len(text) - size], text[len(text) - size :]
        shown = (self._space + certain).rstrip()
        self._space = (self._space + certain)[len(shown) :]
        self._called &= not shown
        return [shown] if shown else []

    def flush(self) -> list[str | Call]:
        """The rest as text, at the end: a call that is not complete, but no white space behind calls."""
        held = (START if self._inside else "") + self._held
        space = "" if self._called and not held else self._space
        self._held, self._space, self._inside = "", "", False
        return [space + held] if space + held else []

    def _read(self, body: str) -> Call | None:
        return _from_json(body) if body.lstrip().startswith("{") else self._from_tags(body)

    def _from_tags(self, body: str) -> Call | None:
        body = body.strip()
        function = FUNCTION.match(body)
        if function is None or not body.endswith("</function>"):
            return None
        name, inner = function[1].strip(), body[function.end() :]
        properties = self._schemas.get(name, {}).get("properties", {})
        found = [(key.strip(), value) for key, value in PARAMETER.findall(inner)]
        values = {key: _typed(value, properties.get(key)) for key, value in found}
        return Call(name, json.dumps(values, ensure_ascii=False))


def _from_json(body: str) -> Call | None:
    try:
        value = json.loads(body, strict=False)  # models write line breaks into texts as they are
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return Call(value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def _typed(text: str, schema: Any) -> Any:
    """A bare value as its schema wants it: a text, or JSON, or Python's True, False and None."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    kinds = {kinds} if isinstance(kinds, str) else set(kinds) if isinstance(kinds, list) else set()
    if kinds == {"string"} or (
        not kinds and not (isinstance(schema, dict) and {"anyOf", "oneOf", "$ref"} & schema.keys())
    ):
        return text
    word = text.strip()
    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(word, word))
    except (ValueError, RecursionError):
        return text
    return text if "string" in kinds and isinstance(value, (int, float)) else value
