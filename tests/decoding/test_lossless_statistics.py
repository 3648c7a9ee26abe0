"""Speculative output has the distribution of plain sampling, exactly; and this test sees it when a rule is broken.

Requests of all settings share one batch. Their first three tokens (which span several rounds) are compared with the
distribution that the toy target's table implies, worked out token by token in float64.
"""

from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.decoding import acceptance, noise, sampling, shortlist
from dflash_jax.decoding.proposal import Candidates
from dflash_jax.decoding.sampling import Sampling
from dflash_jax.models.head import Head
from tests.decoding import toy
from tests.statistics import THRESHOLD, chi_square, histogram, marginal

SEEDS, STEPS, WIDTH = 10000, 3, 3
COLLAPSED = 1e-9
MODEL = toy.Toy()
DEFAULTS = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
}
GROUPS = {
    "temperature": {"temperature": 1.2},
    "filters": {"temperature": 0.9, "top_k": 5, "top_p": 0.85, "min_p": 0.05},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.8, "frequency_penalty": 0.9},
    "everything": {
        "temperature": 1.1,
        "top_k": 6,
        "top_p": 0.9,
        "min_p": 0.04,
        "repetition_penalty": 0.8,
        "presence_penalty": -0.7,
        "frequency_penalty": 1.1,
        "logit_bias": {1: 1.0, 6: -1.5},
    },
    "greedy": {"frequency_penalty": 0.5},
}


@pytest.fixture(autouse=True)
def as_on_accelerators(monkeypatch):
    monkeypatch.setattr(acceptance, "platform_dependent", lambda *given, default, **_: default(*given))


@cache
def exact(group):
    return MODEL.exact(GROUPS[group], STEPS)


@cache
def build(groups):
    requests = [DEFAULTS | GROUPS[name] for name in groups] * SEEDS
    settings = {name: [request[name] for request in requests] for name in DEFAULTS}
    return Sampling.build(len(requests), toy.VOCAB, seed=list(range(len(requests))), **settings)


def sample(kind, width=WIDTH, groups=tuple(GROUPS)):
    """{group: tokens [SEEDS, STEPS]}, and the mean tokens a round."""
    tokens, rate = toy.speculate(MODEL, kind, width, build(groups), STEPS)
    return {name: tokens[i :: len(groups)] for i, name in enumerate(groups)}, rate


def p_values(tokens, group):
    """Of each token, of each two neighbours, and of all three together."""
    counts = histogram(tokens, toy.VOCAB)
    axes = [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)]
    return {chosen: chi_square(marginal(counts, chosen), marginal(exact(group), chosen)) for chosen in axes}


# All groups in one batch need whole logits; one by one they take a short list where that is enough.
@pytest.mark.parametrize("together", [tuple(GROUPS), ("temperature",), ("filters",)], ids=["all", "warm", "top-k"])
@pytest.mark.parametrize(
    ("kind", "width"), [("argmax", 1), ("argmax", WIDTH), ("candidates", WIDTH), ("ragged", WIDTH)]
)
def test_output_has_the_distribution_of_plain_sampling(kind, width, together):
    assert build(together).plan.whole == (len(together) > 1)
    groups, rate = sample(kind, width, together)
    for group, tokens in groups.items():
        values = p_values(tokens, group)
        assert min(values.values()) > THRESHOLD, (group, values)
    # Three tokens hold a whole round, its bonus included, and also the seams of shorter ones.
    # The drafter is neither useless nor perfect, so that every branch was taken.
    assert rate == 1 if width == 1 else 1.3 < rate < 3


def test_argmax_drafts_give_the_tokens_of_plain_sampling():
    plain, _ = sample("argmax", 1)
    speculative, rate = sample("argmax", 4)
    assert rate > 1.3
    for group in GROUPS:
        np.testing.assert_array_equal(speculative[group], plain[group])


def _accept_always(monkeypatch):
    monkeypatch.setattr(acceptance, "uniform", lambda seed, positions: jnp.zeros(positions.shape))


def _accept_independently_of_q(monkeypatch):
    ones = lambda candidates: Candidates(candidates.ids, jnp.where(candidates.probs > 0, 1.0, 0.0))  # noqa: E731
    right = acceptance._accept_by_ratio
    monkeypatch.setattr(acceptance, "_accept_by_ratio", lambda t, c, *rest: right(t, ones(c), *rest))


def _residual_is_p(monkeypatch):
    right = acceptance._last
    none = lambda candidates: Candidates(candidates.ids, jnp.zeros_like(candidates.probs))  # noqa: E731
    monkeypatch.setattr(acceptance, "_last", lambda p, s, t, c, *rest: right(p, s, t, none(c), *rest))


def _residual_after_full_acceptance(monkeypatch):
    right = acceptance._last
    monkeypatch.setattr(
        acceptance, "_last", lambda p, f, t, c, at, s, row: right(p, f, t, c, at, s, jnp.minimum(row, t.shape[1] - 2))
    )


def _residual_uses_the_drafters_noise(monkeypatch):
    right = noise.row_keys
    monkeypatch.setattr(shortlist, "row_keys", lambda seed, at: right(seed, at, noise.Purpose.DRAFT))


def _row_zero_penalises_every_row(monkeypatch):
    monkeypatch.setattr(
        sampling, "row_counts", lambda history, tokens: jnp.repeat(history.counts[:, None], tokens.shape[1], axis=1)
    )


def _anchor_counts_twice(monkeypatch):
    right = sampling.row_counts
    monkeypatch.setattr(sampling, "row_counts", lambda h, t: right(h.add(t[:, :1], jnp.ones_like(t[:, :1], bool)), t))


def _noise_by_row_not_position(monkeypatch):
    right = noise.row_keys
    monkeypatch.setattr(shortlist, "row_keys", lambda seed, at: right(seed, at - at[:, :1]))


def _bonus_is_the_draws_of_a_row_too_late(monkeypatch):
    right = sampling.adjusted
    monkeypatch.setattr(shortlist, "adjusted", lambda logits, *rest: right(jnp.roll(logits, 1, axis=1), *rest))


def _the_list_forgets_the_draw(monkeypatch):
    _samples(monkeypatch, lambda out: replace(out, drawn_ids=out.ids[..., :1], drawn_logits=out.values[..., :1]))


def _the_list_forgets_the_candidates(monkeypatch):
    _samples(monkeypatch, lambda out: replace(out, given=None if out.given is None else out.given - jnp.inf))


def _samples(monkeypatch, wrong):
    right = Head.sample
    monkeypatch.setattr(Head, "sample", lambda *given, **options: wrong(right(*given, **options)))


def _top_p_before_top_k(monkeypatch):
    right = sampling.filtered

    def wrong(logits, settings):
        off = jnp.zeros_like
        first = Sampling(**{**vars(settings), "top_k": off(settings.top_k)})
        second = Sampling(**{**vars(settings), "top_p": off(settings.top_p) + 1})
        return jnp.minimum(right(logits, first), right(logits, second))

    monkeypatch.setattr(shortlist, "filtered", wrong)


@pytest.mark.parametrize(
    ("breaks", "kind", "group"),
    [
        (_accept_always, "candidates", "temperature"),
        (_accept_independently_of_q, "candidates", "temperature"),
        (_residual_is_p, "candidates", "filters"),
        (_residual_after_full_acceptance, "candidates", "temperature"),
        (_residual_uses_the_drafters_noise, "candidates", "temperature"),
        (_row_zero_penalises_every_row, "candidates", "penalties"),
        (_row_zero_penalises_every_row, "argmax", "everything"),
        (_anchor_counts_twice, "argmax", "penalties"),
        (_noise_by_row_not_position, "argmax", "temperature"),
        (_bonus_is_the_draws_of_a_row_too_late, "argmax", "everything"),
        (_the_list_forgets_the_draw, "argmax", "temperature"),
        (_the_list_forgets_the_candidates, "candidates", "temperature"),
        (_top_p_before_top_k, "argmax", "filters"),
    ],
)
def test_a_broken_rule_is_detected(monkeypatch, breaks, kind, group):
    breaks(monkeypatch)
    groups, _ = sample(kind, groups=(group,))
    values = p_values(groups[group], group)
    assert min(values.values()) < COLLAPSED, values
