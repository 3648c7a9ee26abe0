"""The grammar that a body asks for: OpenAI's `response_format`, or `structured_outputs` as other engines have it."""

import json
from typing import Any

from dflash_jax.errors import InputError
from serve.api.schemas import Body
from serve.grammar import Grammar

FORMATS = ("text", "json_object", "json_schema")
MOST_GBNF = 2**15  # characters; its reader takes time by the square of them
STRUCTURES = ("json", "regex", "grammar", "choice")


def grammar_of(body: Body) -> Grammar | None:
    """Return the grammar that a body asks for; None for none. InputError for two, or for one that is not understood."""
    found = {
        "response_format": None if body.response_format is None else _of_format(body.response_format),
        "structured_outputs": None if body.structured_outputs is None else _of_structure(body.structured_outputs),
        "regex": None if body.regex is None else Grammar("regex", body.regex),
        "ebnf": None if body.ebnf is None else _of_gbnf(body.ebnf),
        "allowed_token_ids": None if body.allowed_token_ids is None else _of_tokens(body.allowed_token_ids),
    }
    given = {name: grammar for name, grammar in found.items() if grammar is not None}
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} were both given; leave one out")
    return next(iter(given.values()), None)


def _of_gbnf(text: str) -> Grammar:
    from llguidance.gbnf_to_lark import any_to_lark

    if len(text) > MOST_GBNF:
        raise InputError(f"ebnf has {len(text)} characters; give at most {MOST_GBNF}")
    try:
        return Grammar("lark", any_to_lark(text))
    except Exception as error:  # it raises bare Exceptions, and a RecursionError for what is nested too deeply
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"ebnf is no grammar in GBNF: {reason}; correct it") from None


def _of_tokens(ids: list[int]) -> Grammar:
    """Return the grammar of any text of some tokens."""
    return Grammar("lark", f"start: <[{','.join(map(str, sorted({max(i, 0) for i in ids})))}]>*")


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
