"""`min_tokens` and `logprobs`: what plain decoding gives, with drafts as without, request by request of one batch."""

import dataclasses
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from dflash_jax.decoding.generate import generate, stream
from dflash_jax.errors import InputError
from dflash_jax.text import Tokenizer, Transcript
from tests.decoding import pairs

pytestmark = pytest.mark.usefixtures("small_chunks")
PROMPTS = pairs.prompts([1, 3, 5, 8, 2, 4, 6, 7])
STOPS, NEW, GREEDY = [2, 4], 20, 5  # the first five requests are greedy
SETTINGS = {
    "min_tokens": [0, 1, 6, 9, 20, 0, 7, 12],
    "temperature": [0.0] * GREEDY + [1.3, 0.9, 1.1],
    "top_k": [0] * 6 + [4, 0],
    "frequency_penalty": [0.0] * 7 + [0.5],
    "seed": list(range(8)),
    "stop": STOPS,
    "logprobs": 3,
}


@cache
def lettered():
    """A pair whose tokens are the letters a to f."""
    core = Core(models.WordLevel({letter: i for i, letter in enumerate("abcdef")}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return dataclasses.replace(pairs.pair("qwen3", sharpness=3.0), tokenizer=Tokenizer(core, Path("tests"), 6))


@cache
def run(draft=True):
    return generate(lettered(), PROMPTS, max_new_tokens=NEW, draft=draft, **SETTINGS)


def logits(prompt, tokens):
    """After each token of the output, the one before it first."""
    row = np.zeros((1, 32), np.int32)
    row[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    return np.array(lettered().logits(row)[0, len(prompt) - 1 : len(prompt) + len(tokens)])


def plainly(prompt, least):
    """Greedy decoding, one look at all logits a token."""
    tokens = []
    while len(tokens) < NEW and not (tokens and tokens[-1] in STOPS):
        row = logits(prompt, tokens)[-1]
        if len(tokens) < least:
            row[STOPS] = -np.inf
        tokens.append(int(np.argmax(row)))
    return tokens


def check(prompt, generation, top):
    """Log-probabilities, against the whole logits of the whole text."""
    rows = np.asarray(jax.nn.log_softmax(logits(prompt, generation.tokens)))
    assert len(generation.logprobs) == len(generation.tokens)
    for row, token, entry in zip(rows, generation.tokens, generation.logprobs, strict=False):
        ids, values = [t for t, _ in entry.top], [v for _, v in entry.top]
        np.testing.assert_allclose(entry.logprob, row[token], atol=1e-4)
        np.testing.assert_allclose(values, np.sort(row)[::-1][:top], atol=1e-4)
        np.testing.assert_allclose(row[ids], values, atol=1e-4)
        assert len(set(ids)) == top


def test_greedy_requests_with_min_tokens_get_the_tokens_of_plain_decoding():
    for prompt, least, got in zip(PROMPTS[:GREEDY], SETTINGS["min_tokens"], run(), strict=False):
        assert got.tokens == plainly(prompt, least)


def test_sampled_requests_get_the_tokens_of_plain_sampling():
    assert [g.tokens for g in run()] == [g.tokens for g in run(draft=False)]


def test_stop_tokens_come_where_they_may_and_not_before():
    for least, got in zip(SETTINGS["min_tokens"], run(), strict=True):
        assert not set(STOPS) & set(got.tokens[:least])
        assert len(got.tokens) >= least
    assert sum(g.finish_reason == "stop" for g in run()) >= 4
    blocks = [n for g in run() for n in g.acceptance_lengths]
    assert 1 < np.mean(blocks) < pairs.BLOCK  # drafts were accepted and refused


@pytest.mark.parametrize("draft", [True, False])
def test_logprobs_are_the_log_softmax_of_the_logits(draft):
    """The raw ones, whatever the request's temperature, filters, penalties and least length."""
    for prompt, generation in zip(PROMPTS, run(draft), strict=True):
        check(prompt, generation, 3)


def test_logprobs_of_a_stream():
    """A single greedy request, for which no whole logits are made. Pieces have as many entries as tokens."""
    (full,) = generate(lettered(), PROMPTS[2], max_new_tokens=NEW, logprobs=5)
    assert full.tokens == generate(lettered(), PROMPTS[2:3], max_new_tokens=NEW)[0].tokens
    check(PROMPTS[2], full, 5)
    stop = full.text[7:10]  # which ends inside a block or outside
    pieces = list(stream(lettered(), PROMPTS[2], max_new_tokens=NEW, logprobs=2, stop=stop))
    entries = [e for p in pieces for e in p.logprobs]
    assert all(len(p.logprobs) == len(p.tokens) for p in pieces)
    assert len(entries) == full.text.index(stop) + 3
    assert [e.logprob for e in entries] == [e.logprob for e in full.logprobs[: len(entries)]]
    assert [e.top for e in entries] == [e.top[:2] for e in full.logprobs[: len(entries)]]


def test_stop_texts_are_looked_for_behind_the_first_tokens():
    for least, text in ((0, ""), (2, "ab"), (4, "ababc"), (7, "ababcab")):
        transcript = Transcript(lettered().tokenizer, "a", least)
        assert transcript.push([0, 1, 0, 1, 2, 0, 1, 0])[0] == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 1.5}, "min_tokens is 1.5"),
        ({"min_tokens": [1, 2]}, "min_tokens has 2 entries"),
        ({"min_tokens": 9}, "min_tokens is 9, and max_new_tokens 8"),
        ({"min_tokens": 1, "stop": list(range(6))}, "each of the 6 tokens is a stop token"),
        *(({"logprobs": bad}, "logprobs is .* 0 to 6") for bad in (-1, 7, True, 1.0, "3")),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        generate(lettered(), [1, 2], max_new_tokens=8, **settings)
