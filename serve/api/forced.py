"""Tool calls that have to come: `tool_choice` is "required" or names a function, and a grammar sees to it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dflash_jax.errors import InputError
from serve.api.schemas import ChatBody, Signature
from serve.grammar import JSON_STYLE, Grammar

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}  # a function without parameters


def names_function(body: ChatBody) -> bool:
    """Whether `tool_choice` is one function."""
    return isinstance(body.tool_choice, dict)


def forced(body: ChatBody) -> list[Signature]:
    """The functions of which one has to be called; none where the model is free. InputError for an unknown choice."""
    choice, functions = body.tool_choice, [tool.function for tool in body.tools or ()]
    if choice in (None, "auto", "none"):
        return []
    if choice == "required":
        if not functions:
            raise InputError("tool_choice is required, and there are no tools; give some")
        return functions
    inner = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise InputError(
            f"tool_choice is {str(choice)[:80]}; give auto, none, required, or "
            "{'type': 'function', 'function': {'name': ...}}"
        )
    if named := [function for function in functions if function.name == inner["name"]]:
        return named[:1]
    raise InputError(f"tool_choice names the function {inner['name'][:40]!r}, which is not among the tools; add it")


def call_grammar(functions: Sequence[Signature], *, tags: bool, several: bool) -> Grammar:
    """Calls of some functions and nothing else, in the way of writing of `serve.api.tools`: with JSON or with tags."""
    rules = [_tagged(i, function) if tags else _json(i, function) for i, function in enumerate(functions)]
    bodies = " | ".join(f"f{i}" for i in range(len(functions)))
    more = r' ("\n" call)*' if several else ""
    lines = [f"start: call{more}", f'call: "<tool_call>\\n" ({bodies}) "\\n</tool_call>"', *rules]
    if tags:
        lines.append(r'text[suffix="\n</parameter>\n"]: /(?s:.*)/')
    return Grammar("lark", "\n".join(lines))


def free_grammar(functions: Sequence[Signature], *, tags: bool, several: bool) -> Grammar:
    """Any text in which calls of functions that are strict follow their schemas, and others are only well formed.

    The text is free up to a call's opening tag. Without `several` it ends with its first call.
    """
    rules = [
        (_tagged if tags else _json)(i, function) if function.strict else _loose(i, function, tags)
        for i, function in enumerate(functions)
    ]
    bodies = " | ".join(f"f{i}" for i in range(len(functions)))
    lines = [
        "start: call* TEXT" if several else "start: TEXT | call",
        f'call: opened "\\n" ({bodies}) "\\n</tool_call>"',
        'opened[lazy]: TEXT "<tool_call>"',
        "TEXT: /(?s:.*)/",
        *rules,
        r'text[suffix="\n</parameter>\n"]: /(?s:.*)/',
        'rest[suffix="</function>"]: /(?s:.*)/',
    ]
    return Grammar("lark", "\n".join(lines))


def _loose(number: int, function: Signature, tags: bool) -> str:
    if tags:
        return f"f{number}: {_text(f'<function={function.name}>')} rest"
    return _json(number, function.model_copy(update={"parameters": {"type": "object"}}))


def _json(number: int, function: Signature) -> str:
    head = _text(f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": ')
    return f'f{number}: {head} {_value(function.parameters or NOTHING)} "}}"'


def _tagged(number: int, function: Signature) -> str:
    schema: Any = function.parameters or NOTHING
    properties, required = schema.get("properties"), schema.get("required")
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    parts = [_text(f"<function={function.name}>\n")]
    for name, kind in properties.items() if isinstance(properties, dict) else ():
        part = _text(f"<parameter={name}>\n") + f" {_bare(kind, shared)}"
        parts.append(part if isinstance(required, list) and name in required else f"({part})?")
    return " ".join([f"f{number}:", *parts, _text("</function>")])


def _bare(schema: Any, shared: Mapping[str, Any]) -> str:
    """A parameter's value as it is written between tags, and the closing one: texts have no quotation marks."""
    end = _text("\n</parameter>\n")
    if not isinstance(schema, dict):
        return f"{_value(schema)} {end}"
    if isinstance(choices := schema.get("enum"), list) and choices:
        values = (value if isinstance(value, str) else json.dumps(value) for value in choices)
        return f"({' | '.join(map(_text, values))}) {end}"
    return "text" if schema.get("type") == "string" else f"{_value({**schema, **shared})} {end}"


def _value(schema: Any) -> str:
    """JSON of a schema, within a grammar."""
    styled = {**schema, "x-guidance": JSON_STYLE} if isinstance(schema, dict) else schema
    return f"%json {json.dumps(styled)}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
