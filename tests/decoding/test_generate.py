"""Where generations end, what of them is text, and how they stream."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from dflash_jax.decoding import generate as generate_module
from dflash_jax.decoding.generate import generate, stream
from dflash_jax.text import Tokenizer
from tests.decoding import pairs

pytestmark = pytest.mark.usefixtures("small_chunks")
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 21]
PROMPTS = pairs.prompts(LENGTHS)
NEW = 36


@cache
def lettered():
    """A pair whose tokens are the letters a to f."""
    core = Core(models.WordLevel({letter: i for i, letter in enumerate("abcdef")}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return dataclasses.replace(pairs.pair("qwen3_5"), tokenizer=Tokenizer(core, Path("tests"), pairs.VOCAB))


@cache
def whole():
    return generate(lettered(), PROMPTS, max_new_tokens=NEW)


def text(tokens):
    return "".join("abcdef"[t] for t in tokens)


def drafted(generation):
    """For each token, whether it was drafted, by the acceptance lengths of a generation that is long enough."""
    flags = [False]
    for n in generation.acceptance_lengths:
        flags += [True] * (n - 1) + [False]
    return flags


def up_to(lengths, left):
    kept = []
    for n in lengths:
        if left > 0:
            kept.append(min(n, left))
            left -= n
    return kept


def check_prefix(got, full, new, reason):
    """`got` is the first `new` tokens of `full`, and its last round ends where the output does."""
    assert got.tokens == full.tokens[:new]
    assert got.acceptance_lengths == up_to(full.acceptance_lengths, new - 1)
    assert got.finish_reason == reason


def test_whole_generations():
    for generation in whole():
        assert len(generation.tokens) == NEW and generation.finish_reason == "length"
        assert generation.text == text(generation.tokens)
    assert len({n for g in whole() for n in g.acceptance_lengths}) > 2


@pytest.mark.parametrize("stop", range(pairs.VOCAB))
def test_a_stop_token_ends_its_own_request_inside_a_block(stop):
    outputs = generate(lettered(), PROMPTS, max_new_tokens=NEW, stop=[stop])
    for got, full in zip(outputs, whole(), strict=True):
        if stop in full.tokens:
            check_prefix(got, full, full.tokens.index(stop) + 1, "stop")
        else:
            check_prefix(got, full, NEW, "length")


def test_stop_tokens_were_met_inside_blocks():
    """The test above sees what follows a stop token in its block: a drafted one, which is never a round's last."""
    inside = [g for g in whole() for t in set(g.tokens) if drafted(g)[g.tokens.index(t)]]
    assert len(inside) > 3


def test_the_targets_own_end_tokens_end_a_generation():
    target = lettered().target
    before, target.config = target.config, dataclasses.replace(target.config, eos_token_ids=(2, 4))
    try:
        fresh = dataclasses.replace(lettered())  # without the split that the old pair keeps
        outputs = generate(fresh, PROMPTS, max_new_tokens=NEW)
    finally:
        target.config = before
    for got, full in zip(outputs, whole(), strict=True):
        ends = [i for i, t in enumerate(full.tokens) if t in (2, 4)]
        check_prefix(got, full, ends[0] + 1 if ends else NEW, "stop" if ends else "length")


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6, 7, 11])
def test_max_new_tokens_ends_inside_a_block(new):
    for got, full in zip(generate(lettered(), PROMPTS, max_new_tokens=new), whole(), strict=True):
        check_prefix(got, full, new, "length")


def test_a_stop_token_at_the_limit_is_a_stop():
    full = whole()[0]
    new = full.tokens.index(full.tokens[5]) + 1
    got = generate(lettered(), PROMPTS, max_new_tokens=new, stop=full.tokens[5])[0]
    check_prefix(got, full, new, "stop")


def test_the_models_last_position_is_the_end():
    target = lettered().target
    before, target.config = target.config, dataclasses.replace(target.config, max_position=30)
    try:
        outputs = generate(dataclasses.replace(lettered()), PROMPTS, max_new_tokens=500)
    finally:
        target.config = before
    for length, got, full in zip(LENGTHS, outputs, whole(), strict=True):
        check_prefix(dataclasses.replace(got, tokens=got.tokens[:NEW]), full, min(NEW, 30 - length), "length")
        assert len(got.tokens) == 30 - length


@pytest.mark.parametrize("dispatch", [1, 3, 16])
def test_stop_texts_across_tokens(dispatch, monkeypatch, states):
    """A text of three tokens ends each request where it has it first, whatever the dispatches."""
    monkeypatch.setattr(generate_module, "ROUNDS_PER_DISPATCH", dispatch)
    stop = text(whole()[3].tokens[9:12])
    outputs = generate(lettered(), PROMPTS, max_new_tokens=NEW, stop=stop)
    found = 0
    for got, full in zip(outputs, whole(), strict=True):
        at = full.text.find(stop)
        found += at >= 0
        check_prefix(got, full, at + 3 if at >= 0 else NEW, "stop" if at >= 0 else "length")
        assert got.text == (full.text[:at] if at >= 0 else full.text)
    assert 0 < found < len(PROMPTS)
    assert len(states) >= max(2, max(len(got.acceptance_lengths) for got in outputs) / dispatch)


@pytest.mark.parametrize("stop", [(), "cb", (3,)])
def test_pieces_of_a_stream_make_the_generation(stop):
    new = NEW - pairs.BLOCK  # the longer output knows whether the last tokens were drafted
    for prompt in (PROMPTS[2], PROMPTS[9]):
        (expected,) = generate(lettered(), [prompt], max_new_tokens=new, stop=stop)
        pieces, steps = [], stream(lettered(), prompt, max_new_tokens=new, stop=stop)
        while True:
            try:
                pieces.append(next(steps))
            except StopIteration as end:
                returned = end.value
                break
        assert returned == expected
        assert [t for p in pieces for t in p.tokens] == expected.tokens
        assert "".join(p.text for p in pieces) == expected.text
        full = whole()[PROMPTS.index(prompt)]
        assert [f for p in pieces for f in p.drafted] == drafted(full)[: len(expected.tokens)]
        assert len(pieces) > 1 or len(expected.tokens) < 5


def test_a_single_prompt_of_any_kind_is_a_batch_of_one():
    ids = PROMPTS[4]
    assert generate(lettered(), text(ids), max_new_tokens=4) == generate(lettered(), ids, max_new_tokens=4)
    assert generate(lettered(), [text(ids)], max_new_tokens=4)[0].tokens == whole()[4].tokens[:4]
    assert generate(lettered(), [], max_new_tokens=4) == []
