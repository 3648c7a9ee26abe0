"""Grammars, `min_tokens` and `logprobs` in the engine, against decoding one token at a time on the host."""

import json
import logging
import re
import sys
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import llguidance
import numpy as np
import pytest

from dflash_jax.decoding.noise import gumbel
from dflash_jax.errors import InputError
from dflash_jax.pair import EMBEDDED
from dflash_jax.text import load_tokenizer
from serve.engine import Engine
from serve.grammar import Grammar, Grammars, Matcher
from serve.requests import Request
from tests.decoding import pairs
from tests.serve import engines

END = 5  # the letter f
CONFIG = replace(engines.SMALL, buckets=(3,), prefill=((1, 16),), logprobs=3, grammar=True)
PROMPTS = pairs.prompts([3, 9, 20, 1, 7], seed=2)
REGEX = "(ab|cde|bc)+"
GRAMMARS = [
    Grammar("regex", REGEX),
    Grammar("regex", "[a-e]{9}"),
    Grammar("lark", 'start: "a" rest+ "e"\nrest: "bc" | "d" start "d"'),
    Grammar("regex", "(a|bc|d[ce]){20,}"),
]
FREE = [Request(p, max_new_tokens=30, **engines.KINDS[i]) for i, p in enumerate(PROMPTS)]


@cache
def pair():
    """Its tokens are the letters a to f, and f ends a text."""
    made = pairs.pair.__wrapped__("qwen3", sharpness=3.0)
    made.target.config = replace(made.target.config, eos_token_ids=(END,))
    return replace(made, tokenizer=engines.letters(pairs.VOCAB))


@pytest.fixture(scope="module")
def engine():
    return Engine(pair(), CONFIG)


def logits(tokens):
    """After each token."""
    row = np.zeros((1, 128), np.int32)
    row[0, : len(tokens)] = tokens
    return np.array(pair().logits(row)[0, : len(tokens)])


def allowed(matcher):
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return bits[: pairs.VOCAB].astype(bool)


def plainly(request):
    """(tokens, finish reason) of plain decoding under the same masks."""
    matcher, tokens, stops = None, [], {END, *request.stop}
    if request.grammar is not None:
        bridge = llguidance.LLTokenizer(pair().tokenizer.core.to_str(), n_vocab=pairs.VOCAB, eos_token=[END])
        source = getattr(llguidance.LLMatcher, f"grammar_from_{request.grammar.kind}")(request.grammar.text)
        matcher = llguidance.LLMatcher(bridge, source)
    while len(tokens) < request.max_new_tokens:
        row = logits([*request.prompt, *tokens])[-1]
        if matcher is not None:
            row[~allowed(matcher)] = -np.inf
        if len(tokens) < request.min_tokens:
            row[list(stops)] = -np.inf
        if request.temperature:
            at = jnp.array([[len(request.prompt) + len(tokens)]])
            noise = gumbel(jnp.array([request.seed], jnp.uint32), at, pairs.VOCAB)[0, 0]
            row = (row - row.max()) / np.float32(request.temperature) + np.asarray(noise)
        tokens.append(int(np.argmax(row)))
        if matcher is not None:
            assert matcher.consume_token(tokens[-1])
            if matcher.is_stopped():
                return tokens, "stop"
        if tokens[-1] in stops:
            return tokens, "stop"
    return tokens, "length"


def test_requests_with_a_grammar_get_what_plain_decoding_under_its_masks_gives(engine):
    """Greedy and sampled, beside requests without one, which get what they get among themselves."""
    alone = engines.run(engine, FREE)
    settings = [{}, {"temperature": 1.4, "seed": 7}]
    bound = [
        Request(p, max_new_tokens=26, grammar=grammar, **settings[(i + j) % 2])
        for i, grammar in enumerate(GRAMMARS)
        for j, p in enumerate(PROMPTS[:3])
    ]
    mixed = [r for few in zip(bound[::2], bound[1::2], FREE, strict=False) for r in few] + bound[10:]
    handles = [engine.submit(r) for r in mixed]
    engines.drain(engine)
    results = [h.result() for h in handles]
    free = iter(alone)
    for request, result in zip(mixed, results, strict=True):
        if request.grammar is None:
            assert result.tokens == next(free).tokens
        else:
            assert (result.tokens, result.finish_reason) == plainly(request)
    usage = [h.usage for h in handles if h.request.grammar is not None]
    assert sum(u.accepted_tokens for u in usage) > 10  # drafts were right
    assert sum(u.drafted_tokens for u in usage) > 2 * sum(u.accepted_tokens for u in usage)  # and wrong
    assert {r.finish_reason for r in results} == {"stop", "length"}
    engines.check_idle(engine)


def test_what_ends_by_itself_matches(engine):
    """And it ends where nothing can follow, without an end token and in the middle of a block."""
    texts = [REGEX, "abc", "[a-e]{2,9}", "(a|bc)d*e"]
    requests = [Request(p, max_new_tokens=60, grammar=Grammar("regex", t)) for t in texts for p in PROMPTS[:2]]
    results = engines.run(engine, requests)
    for request, result in zip(requests, results, strict=True):
        if result.finish_reason == "stop":
            assert re.fullmatch(request.grammar.text, result.text.removesuffix("f"))
    assert sum(r.finish_reason == "stop" for r in results) >= 5
    assert [r.tokens for r in results[2:4]] == [[0, 1, 2]] * 2


def test_preempted_and_cancelled_requests_with_a_grammar(engine):
    before = engine.stats.preempted
    bound = Request(PROMPTS[2], max_new_tokens=70, grammar=Grammar("regex", "[a-e]{80}"))
    requests = [bound, replace(bound, temperature=1.0), replace(bound, grammar=None, stop=(3,), min_tokens=69), bound]
    handles = [engine.submit(r) for r in requests]
    while engine.stats.preempted == before:
        assert engine.step()
    handles[0].cancel()
    engines.drain(engine)
    assert handles[0].result().finish_reason == "cancelled"
    for request, handle in zip(requests[1:], handles[1:], strict=True):
        assert handle.result().tokens == plainly(request)[0]
    engines.check_idle(engine)


def test_min_tokens_and_logprobs(engine):
    """Beside a request with a grammar, and with one."""
    requests = [
        Request(PROMPTS[0], max_new_tokens=25, stop=(2, 3), min_tokens=9, logprobs=2),
        Request(PROMPTS[1], max_new_tokens=25, temperature=1.2, seed=3, stop=(2, 3), min_tokens=4, logprobs=0),
        Request(PROMPTS[2], max_new_tokens=25, grammar=GRAMMARS[0], logprobs=3),
        Request(PROMPTS[3], max_new_tokens=25, stop=(2, 3), min_tokens=25),
    ]
    handles = [engine.submit(r) for r in requests]
    engines.drain(engine)
    for request, handle in zip(requests, handles, strict=True):
        result = handle.result()
        assert (result.tokens, result.finish_reason) == plainly(request)
        if request.logprobs is None:
            assert result.logprobs is None
            continue
        rows = np.asarray(jax.nn.log_softmax(logits([*request.prompt, *result.tokens])))[len(request.prompt) - 1 :]
        assert len(result.logprobs) == len(result.tokens)
        for row, token, entry in zip(rows, result.tokens, result.logprobs, strict=False):
            best = np.argsort(-row)[: request.logprobs]
            assert [t for t, _ in entry.top] == best.tolist()
            np.testing.assert_allclose([entry.logprob, *(v for _, v in entry.top)], row[[token, *best]], atol=1e-4)


def test_pieces_carry_their_logprobs(engine):
    handle = engine.submit(Request(PROMPTS[1], max_new_tokens=20, logprobs=1))
    engines.drain(engine)
    pieces = list(handle)
    assert len(pieces) > 1
    assert tuple(e for p in pieces for e in p.logprobs) == handle.result().logprobs


def test_nothing_is_compiled_after_the_start(engine, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        requests = [
            Request([1, 2, 3], max_new_tokens=9, grammar=Grammar("regex", "[ab]*")),
            Request([1, 2], max_new_tokens=9, grammar=GRAMMARS[1], temperature=0.7, frequency_penalty=1.0),
            Request([1, 2, 4], max_new_tokens=9, min_tokens=3, logprobs=1),
        ]
        engines.run(engine, requests)
    assert not [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]


def test_a_grammar_that_fails_on_the_way_ends_its_own_request(engine, monkeypatch):
    """As one does that gets too large for the parser."""
    take = Matcher.take

    def fails(matcher, tokens):
        kept = take(matcher, tokens)
        matcher.seen = getattr(matcher, "seen", 0) + kept
        if matcher is broken and matcher.seen > 5:
            matcher.error = "too many states"
        return kept

    monkeypatch.setattr(Matcher, "take", fails)
    requests = [Request(PROMPTS[0], max_new_tokens=30, grammar=GRAMMARS[0]), FREE[1]]
    requests.append(replace(requests[0], grammar=Grammar("regex", "[a-e]{20}")))
    handles = [engine.submit(r) for r in requests]
    engine._take_commands(wait=False)
    broken = engine._requests[handles[2]].matcher
    engines.drain(engine)
    assert handles[0].result().tokens == plainly(requests[0])[0]
    assert handles[1].result().tokens == plainly(FREE[1])[0]
    with pytest.raises(InputError, match="the grammar cannot be followed: too many states"):
        handles[2].result()
    engines.check_idle(engine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grammar": Grammar("regex", "[a")}, r"the grammar \(regex\) cannot be used: .*unclosed"),
        ({"grammar": Grammar("lark", "start: foo")}, r"the grammar \(lark\) cannot be used: .*unknown name"),
        ({"grammar": Grammar("json_schema", "{")}, "the JSON schema is not JSON"),
        ({"grammar": Grammar("json_schema", '{"type": "strin"}')}, "Invalid type: strin"),
        ({"grammar": Grammar("gbnf", "x")}, "'gbnf'; give one of json_schema, regex, lark"),
        ({"grammar": Grammar("regex", " ")}, "give a text"),
        ({"grammar": GRAMMARS[0], "min_tokens": 2}, "min_tokens and a grammar"),
        ({"min_tokens": 300}, "min_tokens is 300"),
        ({"logprobs": 4}, "logprobs is 4; this engine names at most 3"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(engine, settings, message):
    with pytest.raises(InputError, match=message) as error:
        engine.submit(Request([1], **settings))
    assert "\n" not in str(error.value)
    engines.check_idle(engine)


def test_without_llguidance(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"grammars need llguidance.*pip install 'dflash-jax\[serve\]'"):
        engine.submit(Request([1], grammar=GRAMMARS[0]))


def test_any_choice_under_the_masks_of_the_embedded_tokenizer_gives_what_the_schema_says():
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["a", "bé"]},
            "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 4},
        },
        "required": ["name", "kind", "sizes"],
        "additionalProperties": False,
    }
    tokenizer = load_tokenizer(EMBEDDED / "tokenizer", 2048)
    stand_in = replace(pair(), tokenizer=tokenizer)
    rng, grammars = np.random.default_rng(1), Grammars(stand_in)
    config, stand_in.target.config = (
        stand_in.target.config,
        replace(stand_in.target.config, vocab_size=2048, eos_token_ids=(0,)),
    )
    try:
        matchers = [grammars.matcher(Grammar("json_schema", json.dumps(schema))) for _ in range(8)]
    finally:
        stand_in.target.config = config
    for matcher in matchers:
        tokens = []
        while not matcher.complete:
            bits = np.unpackbits(matcher.masks((), 1).view(np.uint8), bitorder="little")
            choices = np.flatnonzero(bits)
            if len(tokens) > 100:  # whitespace can go on for ever
                choices = [c for c in choices if tokenizer.decode([c]).strip()] or choices
            tokens.append(int(rng.choice(choices)))
            assert matcher.take(tokens[-1:]) == 1
        found = json.loads(tokenizer.decode(tokens))
        assert found.keys() == {"name", "kind", "sizes"}
        assert found["kind"] in ("a", "bé") and len(found["name"]) <= 12
        assert all(type(x) is int and 0 <= x <= 999 for x in found["sizes"]) and len(found["sizes"]) <= 4
