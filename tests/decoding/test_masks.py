"""Masks leave tokens out of the target's distribution, row by row, and speculation stays exact under them."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.decoding.masks import TokenMask, words_of
from dflash_jax.decoding.sampling import Sampling
from tests.decoding import toy
from tests.statistics import THRESHOLD, chi_square, histogram, marginal

SEEDS, STEPS, WIDTH = 10000, 3, 3
MODEL = toy.Toy(seed=5)
RULES = np.random.default_rng(8).random((toy.VOCAB, toy.VOCAB)) < 0.55
SETTINGS = {"temperature": 1.1, "top_k": 6, "top_p": 0.95, "repetition_penalty": 1.2, "frequency_penalty": 0.4}


def p_value(kind, width=WIDTH):
    """Of single tokens and neighbours, and the mean tokens a round."""
    sampling = Sampling.build(SEEDS, toy.VOCAB, seed=list(range(SEEDS)), **SETTINGS)
    tokens, rate = toy.speculate(MODEL, kind, width, sampling, STEPS, RULES)
    counts, exact = histogram(tokens, toy.VOCAB), MODEL.exact(SETTINGS, STEPS, RULES)
    axes = [(0,), (1,), (2,), (0, 1), (1, 2)]
    return min(chi_square(marginal(counts, a), marginal(exact, a)) for a in axes), rate


def test_every_token_can_be_followed_and_none_by_all():
    assert np.delete(RULES, toy.STOP, 1).any(1).all() and not RULES.all(1).any()


@pytest.mark.parametrize("kind", ["argmax", "candidates", "ragged"])
def test_output_has_the_distribution_of_plain_sampling_under_the_same_masks(kind):
    p, rate = p_value(kind)
    assert p > THRESHOLD
    assert 1.1 < rate < 2.9


def test_a_draft_that_breaks_a_rule_must_not_be_taken_out(monkeypatch):
    """To end the proposal before it looks harmless, but forgets that the draft was drawn from q."""
    propose = toy.propose

    def cut(*arguments):
        proposal = propose(*arguments)
        follows = jnp.asarray(RULES)[proposal.tokens[:, :-1], proposal.tokens[:, 1:]]
        usable = jnp.pad(jnp.cumprod(follows, axis=1), ((0, 0), (1, 0)), constant_values=1)
        return replace(proposal, tokens=jnp.where(usable > 0, proposal.tokens, -1))

    monkeypatch.setattr(toy, "propose", cut)
    assert p_value("candidates")[0] < 1e-9


@pytest.mark.parametrize("vocab", [7, 32, 70])
def test_logits_are_left_out_as_the_masks_say(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(2, 3, vocab)).astype(np.float32)
    words = rng.integers(0, 2**32, (2, 3, words_of(vocab)), dtype=np.uint32)
    stops = np.array([[3, -1], [6, 0]], np.int32)
    early = np.array([[True, False, True], [True, True, False]])
    got = TokenMask(jnp.asarray(stops), jnp.asarray(early), jnp.asarray(words)).apply(jnp.asarray(logits))
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[..., :vocab].astype(bool)
    for b, ends in enumerate(([3], [6, 0])):
        for end in ends:
            bits[b, early[b], end] = False
    np.testing.assert_array_equal(got, np.where(bits, logits, -np.inf))
