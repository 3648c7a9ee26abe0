"""The grammar that a body asks for: OpenAI's `response_format`, or `structured_outputs` as other engines have it."""

import json
from typing import Any

from dflash_jax.errors import InputError
from serve.grammar import Grammar

FORMATS = ("text", "json_object", "json_schema")
STRUCTURES = ("json", "regex", "grammar", "choice")


def grammar_of(response_format: dict[str, Any] | None, structured: dict[str, Any] | None) -> Grammar | None:
    """InputError for both, or for one that is not understood."""
    found = None if response_format is None else _of_format(response_format)
    if structured is None:
        return found
    if found is not None:
        raise InputError("response_format and structured_outputs were both given; leave one out")
    return _of_structure(structured)


def _of_format(given: dict[str, Any]) -> Grammar | None:
    kind = given.get("type")
    if kind not in FORMATS:
        raise InputError(f"response_format has the type {str(kind)[:40]!r}; give one of {', '.join(FORMATS)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_schema", '{"type": "object"}')
    inner = given.get("json_schema")
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise InputError("response_format has no json_schema.schema; give the schema as an object")
    return Grammar("json_schema", json.dumps(inner["schema"]))


def _of_structure(given: dict[str, Any]) -> Grammar:
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1 or not named.keys() <= set(STRUCTURES):
        names = ", ".join(sorted(map(str, named)))[:80] or "nothing"
        raise InputError(f"structured_outputs has {names}; give just one of {', '.join(STRUCTURES)}")
    ((name, value),) = named.items()
    if name == "json":
        return Grammar("json_schema", value if isinstance(value, str) else json.dumps(value))
    if name == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
            raise InputError("structured_outputs.choice is no list of texts; give at least one")
        return Grammar("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value))
    if not isinstance(value, str):
        raise InputError(f"structured_outputs.{name} is no text; give the {name} as one")
    return Grammar("regex" if name == "regex" else "lark", value)
