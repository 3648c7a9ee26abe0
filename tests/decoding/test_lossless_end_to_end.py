"""`generate` samples from the target's own distribution, by statistics over thousands of requests in one batch.

The target is a real model; what plain sampling would draw from is worked out in float64 from `pair.logits`, token by
token. DFlash drafts are an argmax; DFlash 2 draws its drafts, and its real q takes part in the acceptance.
"""

import itertools
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.decoding import acceptance
from dflash_jax.decoding.generate import generate
from dflash_jax.decoding.run import rounds_for
from tests.decoding import pairs, reference
from tests.decoding.test_batching import DEFAULTS
from tests.statistics import THRESHOLD, chi_square, histogram, marginal

pytestmark = pytest.mark.usefixtures("small_chunks")
PROMPT = [2, 5, 1]
SEEDS, STEPS = 3000, 4
COLLAPSED = 1e-9
GROUPS = {
    "temperature": {"temperature": 1.1},
    "filters": {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.03},
    "penalties": {
        "temperature": 1.2,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.7,
        "logit_bias": {1: 0.5, 4: -1.0},
    },
}


def pair(drafter):
    return pairs.pair("qwen3", drafter, sharpness=1.5)


@cache
def exact(group):
    """The joint distribution of the first tokens, from the target's logits after every possible beginning."""
    vocab = range(pairs.VOCAB)
    beginnings = [b for n in range(STEPS) for b in itertools.product(vocab, repeat=n)]
    rows = np.array([[*PROMPT, *b, *[0] * (STEPS - len(b))] for b in beginnings])
    logits = np.asarray(pair("dflash").logits(rows))
    joint = np.zeros((pairs.VOCAB,) * STEPS)
    mass = {(): 1.0}
    for beginning, row in zip(beginnings, logits, strict=True):
        following = row[len(PROMPT) + len(beginning) - 1]
        after = reference.probabilities(following, GROUPS[group], PROMPT, beginning)
        for token in vocab:
            mass[(*beginning, token)] = mass[beginning] * after[token]
    for tokens in itertools.product(vocab, repeat=STEPS):
        joint[tokens] = mass[tokens]
    return joint


def sample(drafter, groups=tuple(GROUPS)):
    """{group: tokens [SEEDS, STEPS]}, and the mean tokens a round."""
    requests = [DEFAULTS | GROUPS[name] for name in groups] * SEEDS
    settings = {name: [request[name] for request in requests] for name in DEFAULTS if name != "seed"}
    outputs = generate(
        pair(drafter), [PROMPT] * len(requests), max_new_tokens=STEPS, seed=list(range(len(requests))), **settings
    )
    tokens = np.array([output.tokens for output in outputs])
    rate = np.mean([n for output in outputs for n in output.acceptance_lengths])
    return {name: tokens[i :: len(groups)] for i, name in enumerate(groups)}, rate


def p_values(tokens, group):
    counts = histogram(tokens, pairs.VOCAB)
    axes = [(i,) for i in range(STEPS)] + [(i, i + 1) for i in range(STEPS - 1)]
    return {chosen: chi_square(marginal(counts, chosen), marginal(exact(group), chosen)) for chosen in axes}


@pytest.mark.parametrize("drafter", ["dflash", "dflash2"])
def test_output_has_the_distribution_of_plain_sampling(drafter):
    groups, rate = sample(drafter)
    for group, tokens in groups.items():
        values = p_values(tokens, group)
        assert min(values.values()) > THRESHOLD, (group, values)
    assert 1.1 < rate < 2.5  # drafts were accepted and refused


def _every_draft_stands(monkeypatch):
    monkeypatch.setattr(acceptance, "_prefix", lambda stands: jnp.full(stands.shape[0], stands.shape[1] + 1))


def _q_is_ignored(monkeypatch):
    monkeypatch.setattr(acceptance, "uniform", lambda seed, positions: jnp.zeros(positions.shape))


def _residual_is_p(monkeypatch):
    right = acceptance._last
    nothing = lambda c: acceptance.Candidates(c.ids, jnp.zeros_like(c.probs))  # noqa: E731
    monkeypatch.setattr(acceptance, "_last", lambda p, s, t, c, *rest: right(p, s, t, nothing(c), *rest))


@pytest.mark.parametrize(
    ("breaks", "drafter", "group"),
    [
        (_every_draft_stands, "dflash", "temperature"),
        (_q_is_ignored, "dflash2", "filters"),
        (_residual_is_p, "dflash2", "temperature"),
    ],
)
def test_a_broken_rule_is_detected(monkeypatch, breaks, drafter, group):
    breaks(monkeypatch)
    rounds_for(SEEDS).clear_cache()
    groups, _ = sample(drafter, groups=(group,))
    rounds_for(SEEDS).clear_cache()
    values = p_values(groups[group], group)
    assert min(values.values()) < COLLAPSED, values
