"""Whatever a model chooses under the grammar of a forced call is a call that its schema allows."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dflash_jax.errors import InputError
from dflash_jax.pair import EMBEDDED
from dflash_jax.text import load_tokenizer
from serve.api.forced import call_grammar, forced, free_grammar
from serve.api.schemas import ChatBody, Signature
from serve.api.tools import Call, ToolCalls
from serve.grammar import Grammar, Grammars, Matcher
from tests.serve import engines

KIND = {"enum": ["left", 'say "b" </x>', "é\nü"]}
WEATHER = Signature(
    name="weather",
    parameters={
        "type": "object",
        "properties": {
            "kind": KIND,
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "place": {"$ref": "#/$defs/place"},
            "on": {"type": "boolean"},
        },
        "required": ["kind", "place"],
        "additionalProperties": False,
        "$defs": {
            "place": {
                "type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 2,
            }
        },
    },
)  # fmt: skip
CLOCK = Signature(name="clock")
SAY = Signature(name="say", parameters={"type": "object", "properties": {"text": {"type": "string"}}})


@pytest.fixture(scope="module")
def grammars():
    """Of the embedded pair's tokenizer, as if its model had an end token."""
    pair = engines.pair()
    config = replace(pair.target.config, vocab_size=2048, eos_token_ids=(0,))
    target = type("Target", (), {"config": config})()
    return Grammars(replace(pair, tokenizer=load_tokenizer(EMBEDDED / "tokenizer", 2048), target=target))


def written(matcher: Matcher, rng: np.random.Generator, most: int = 300) -> tuple[str, bool]:
    """A text by chance, and whether it is complete."""
    tokens, tokenizer = [], load_tokenizer(EMBEDDED / "tokenizer", 2048)
    while not matcher.complete and len(tokens) < most and tokens[-1:] != [0]:
        bits = np.unpackbits(matcher.masks((), 1).view(np.uint8), bitorder="little")
        tokens.append(int(rng.choice(np.flatnonzero(bits))))
        assert matcher.take(tokens[-1:]) == 1
    return tokenizer.decode(tokens), matcher.complete or tokens[-1:] == [0]


def calls_of(text: str, *functions: Signature) -> list:
    parser = ToolCalls({function.name: function.parameters or {} for function in functions})
    return [*parser.push(text), *parser.flush()]


@pytest.mark.parametrize("tags", [False, True])
def test_any_choice_is_a_call_that_the_schema_allows(grammars, tags):
    rng, seen = np.random.default_rng(0), set()
    grammar = call_grammar([WEATHER, CLOCK], tags=tags, several=False)
    for _ in range(40):
        text, complete = written(grammars.matcher(grammar), rng)
        (call,) = calls_of(text, WEATHER, CLOCK)
        assert complete and isinstance(call, Call), text
        arguments = json.loads(call.arguments)
        seen.add(call.name)
        if call.name == "clock":
            assert arguments == {}
            continue
        assert {"kind", "place"} <= arguments.keys() <= {"kind", "place", "days", "on"}
        assert arguments["kind"] in KIND["enum"]
        assert arguments.get("days", 1) in range(1, 10) and arguments.get("on", True) in (True, False)
        assert 1 <= len(arguments["place"]) <= 2 and set(arguments["place"]) <= set(range(10))
    assert seen == {"weather", "clock"}


@pytest.mark.parametrize("tags", [False, True])
def test_several_calls(grammars, tags):
    rng = np.random.default_rng(1)
    grammar = call_grammar([CLOCK], tags=tags, several=True)
    counts = set()
    for _ in range(12):
        text, complete = written(grammars.matcher(grammar), rng)
        found = calls_of(text)
        assert complete and all(call == Call("clock", "{}") for call in found)
        counts.add(len(found))
    assert len(counts) > 1 and min(counts) == 1


def accepts(grammars: Grammars, grammar: Grammar, text: str) -> bool:
    """Whether a text matches as a whole."""
    matcher, tokens = grammars.matcher(grammar), load_tokenizer(EMBEDDED / "tokenizer", 2048).encode(text)
    return matcher.take([*tokens, 0]) >= len(tokens) and matcher.error is None


def test_texts_between_tags_are_bare(grammars):
    grammar = call_grammar([SAY], tags=True, several=False)
    text = 'def f():\n    return "<b>é</b>"\n'
    call = f"<tool_call>\n<function=say>\n<parameter=text>\n{text}\n</parameter>\n</function>\n</tool_call>"
    assert accepts(grammars, grammar, call)
    assert calls_of(call, SAY) == [Call("say", json.dumps({"text": text}, ensure_ascii=False))]
    assert not accepts(grammars, grammar, call.replace("say", "sai"))
    assert not accepts(grammars, grammar, "Sure. " + call)


@pytest.mark.parametrize("kind", ["json_schema", "regex", "lark"])
def test_an_answer_behind_thoughts(grammars, kind):
    text = {"json_schema": '{"enum": ["yes"]}', "regex": '"yes"', "lark": 'start: "\\"yes\\""'}[kind]
    grammar = Grammar(kind, text, thinks=True)
    assert accepts(grammars, grammar, 'Hm, "no" </thin </think>\n\n"yes"')
    assert accepts(grammars, grammar, '</think>"yes"')
    assert not accepts(grammars, grammar, 'Hm </think> "no"')
    assert not accepts(grammars, grammar, '"yes"')


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("maybe", "tool_choice is maybe; give auto, none, required"),
        ({"type": "function"}, "give auto, none, required"),
        ({"type": "function", "function": {"name": "g"}}, "names the function 'g', which is not among the tools"),
        (3, "tool_choice is 3;"),
    ],
)
def test_choices_that_cannot_be(choice, message):
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = ChatBody(messages=[{"role": "user", "content": "x"}], tools=tools, tool_choice=choice)
    with pytest.raises(InputError, match=message):
        forced(body)


STRICT = WEATHER.model_copy(update={"strict": True})
CALL = '<tool_call>\n{"name": "weather", "arguments": {"kind": "left", "place": [3]}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "weather", "arguments": {"kind": "right", "place": [3]}}\n</tool_call>'
LOOSE = '<tool_call>\n{"name": "say", "arguments": {"anything": [1, "x"]}}\n</tool_call>'
TAGGED = (
    "<tool_call>\n<function=weather>\n<parameter=kind>\nleft\n</parameter>\n<parameter=place>\n[3]\n</parameter>\n"
    "</function>\n</tool_call>"
)
LOOSE_TAGS = "<tool_call>\n<function=say>\n<parameter=more>\nx y\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "tags", "several", "allowed"),
    [
        ("Nothing to call here.\n\n<b>", False, True, True),
        (f"Let me see.\n{CALL}", False, True, True),
        (f"Let me see.\n{CALL}\n{CALL} Done.", False, True, True),
        (f"Let me see.\n{CALL}\n{CALL}", False, False, False),
        (f"Let me see.\n{CALL}", False, False, True),
        (f"{CALL} and more", False, False, False),
        (WRONG, False, True, False),
        (f"{CALL}\n{WRONG}", False, True, False),
        ('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>', False, True, False),
        (f"{LOOSE} {CALL}", False, True, True),
        (f"Hm {TAGGED}", True, True, True),
        (f"Hm {TAGGED.replace('left', 'right')}", True, True, False),
        (f"{LOOSE_TAGS}{TAGGED}", True, True, True),
    ],
)
def test_text_is_free_and_strict_calls_are_not(grammars, text, tags, several, allowed):
    grammar = free_grammar([STRICT, SAY], tags=tags, several=several)
    assert accepts(grammars, grammar, text) == allowed
    thinking = replace(grammar, thinks=True)
    assert accepts(grammars, thinking, f"I could use {WRONG}</think>\n{text}") == allowed


@pytest.mark.parametrize("tags", [False, True])
def test_any_choice_after_an_opening_tag_is_a_call(grammars, tags):
    rng, grammar = np.random.default_rng(1), free_grammar([STRICT], tags=tags, several=False)
    for _ in range(10):
        matcher = grammars.matcher(grammar)
        opening = grammars._pair.tokenizer.encode("See: <tool_call>\n")
        assert matcher.take(opening) == len(opening)
        text, complete = written(matcher, rng)
        (call,) = calls_of(f"<tool_call>\n{text}", STRICT)
        assert complete and isinstance(call, Call), text
        assert {"kind", "place"} <= json.loads(call.arguments).keys()
