"""What the kernel picks leads to the same tokens as whole logits do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.decoding import acceptance
from dflash_jax.decoding.acceptance import accept, decide
from dflash_jax.decoding.proposal import Candidates, Proposal
from dflash_jax.decoding.sampling import LARGEST_TOP_K, Sampling
from dflash_jax.decoding.shortlist import everything, picked
from dflash_jax.models.head import Head
from pallas_kernels.head_sampling import Projection

BATCH, WIDTH, CHOICES, VOCAB = 300, 4, 3, 200
HEAD = Head(jnp.eye(VOCAB), Projection("vd"))  # hidden rows are logits
SETTINGS = {
    "greedy": {},
    "temperature": {"temperature": [0.0, 0.7, 1.0, 1e-30, 1e30] * 60},
    "top-k": {"temperature": [0.0, 0.7, 1.3] * 100, "top_k": [0, 3, 40] * 100},
    "top-k and more": {"temperature": 1.2, "top_k": 64, "top_p": [0.3, 0.9, 1.0] * 100, "min_p": [0.0, 0.05] * 150},
}


@pytest.fixture(autouse=True)
def as_on_accelerators(monkeypatch):
    monkeypatch.setattr(acceptance, "platform_dependent", lambda *given, default, **_: default(*given))


def batch(seed, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(BATCH, WIDTH, VOCAB)) * scale * 4) / 4  # with ties
    ids = np.argsort(-logits[:, :-1] + rng.normal(size=(BATCH, WIDTH - 1, VOCAB)), -1)[..., :CHOICES]
    probs = rng.dirichlet(np.ones(CHOICES), size=(BATCH, WIDTH - 1))
    drafts = ids[..., 0].copy()
    drafts[rng.random(drafts.shape) < 0.1] = -1
    tokens = jnp.asarray(np.pad(drafts, ((0, 0), (1, 0))), jnp.int32)
    candidates = Candidates(jnp.asarray(ids, jnp.int32), jnp.asarray(probs, jnp.float32))
    positions = jnp.asarray(10 + np.arange(WIDTH) + np.zeros((BATCH, 1)), jnp.int32)
    return jnp.asarray(logits, jnp.float32), tokens, candidates, positions


def build(name):
    return Sampling.build(BATCH, VOCAB, seed=list(range(BATCH)), **SETTINGS[name])


def _whole(proposal, logits, positions, sampling):
    return accept(proposal, everything(logits, sampling), positions, sampling)


@jax.jit
def _decide(proposal, hidden, positions, sampling):
    return decide(HEAD, hidden, proposal, positions, sampling, None)


def same(found, expected):
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(found.emitted, expected.emitted)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("drawn", [False, True])
def test_the_tokens_are_those_of_whole_logits(name, drawn):
    sampling = build(name)
    assert sampling is None or not sampling.plan.whole
    for seed in range(3):
        logits, tokens, candidates, positions = batch(seed)
        proposal = Proposal(tokens, candidates if drawn else None)
        found = _decide(proposal, logits, positions, sampling)
        same(found, jax.jit(_whole)(proposal, logits, positions, sampling))
        assert 1.1 < float(found.count.mean()) < WIDTH


def test_a_tie_that_does_not_fit_is_drawn_from_all(monkeypatch):
    """150 tokens are the third best: every one of them belongs to the top 3."""
    logits, tokens, candidates, positions = batch(0)
    logits = logits.at[7:9, :, 20:170].set(logits[7:9, :, :20].max() + 50.0)
    sampling = Sampling.build(BATCH, VOCAB, temperature=1.0, top_k=3, seed=list(range(BATCH)))
    spilled = picked(HEAD, logits, positions, sampling, None).spilled
    assert np.flatnonzero(spilled).tolist() == [7, 8]
    for proposal in (Proposal(tokens), Proposal(tokens, candidates)):
        same(_decide(proposal, logits, positions, sampling), _whole(proposal, logits, positions, sampling))
    monkeypatch.setattr(acceptance, "everything", lambda *_: pytest.fail("whole logits were asked for"))
    with pytest.raises(pytest.fail.Exception):
        decide(HEAD, logits, Proposal(tokens), positions, sampling, None)


@pytest.mark.parametrize(
    ("settings", "whole", "slots"),
    [
        ({"temperature": 1.0}, False, 0),
        ({"temperature": 1.0, "top_k": 20}, False, 32),
        ({"temperature": [0.0, 1.0], "top_k": [0, LARGEST_TOP_K], "top_p": 0.9}, False, 128),
        ({"temperature": 1.0, "top_k": [0, 20]}, True, 0),
        ({"temperature": 1.0, "top_k": LARGEST_TOP_K + 1}, True, 0),
        ({"temperature": 1.0, "top_p": 0.9}, True, 0),
        ({"temperature": 1.0, "min_p": 0.1}, True, 0),
        ({"temperature": 1.0, "top_k": 20, "presence_penalty": 1.0}, True, 0),
        ({"logit_bias": {3: 1.0}}, True, 0),
    ],
)
def test_who_needs_whole_logits(settings, whole, slots):
    plan = Sampling.build(2, VOCAB, **settings).plan
    assert (plan.whole, plan.slots) == (whole, slots)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_logits_on_an_accelerator(name):
    """Lowered for a TPU no array holds a row of logits for each row, except one request's in the rare branch."""
    rows, vocab, model = BATCH * WIDTH, 1024, 128
    head = Head(jnp.zeros((model, vocab), jnp.bfloat16), Projection("dv"))
    _, tokens, candidates, positions = batch(0)
    hidden = jnp.zeros((BATCH, WIDTH, model), jnp.bfloat16)
    for proposal in (Proposal(tokens), Proposal(tokens, candidates)):
        program = jax.jit(lambda w, *rest: decide(Head(w, head.projection), *rest, None))
        exported = jax.export.export(program, platforms=["tpu"], disabled_checks=())(
            head.weight, hidden, proposal, positions, build(name)
        )
        text = exported.mlir_module()
        assert "tpu_custom_call" in text
        assert f"{rows}x{vocab}x" not in text and f"{BATCH}x{WIDTH}x{vocab}x" not in text
