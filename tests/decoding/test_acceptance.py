import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.decoding.acceptance import accept
from dflash_jax.decoding.proposal import Candidates, Proposal, plain_proposal
from dflash_jax.decoding.sampling import History, Sampling
from dflash_jax.decoding.shortlist import everything

VOCAB, WIDTH, CHOICES = 9, 4, 3


@jax.jit
def _accept(given, logits, at, sampling=None, history=None):
    return accept(given, everything(logits, sampling, history, given.tokens), at, sampling)


@jax.jit
def _distribution(logits, sampling, *rest):
    return everything(logits, sampling, *rest).distribution(sampling)


def positions(batch, first=10):
    return jnp.broadcast_to(first + jnp.arange(WIDTH, dtype=jnp.int32), (batch, WIDTH))


def favouring(*tokens):
    """Logits [1, W, V] whose argmax after row i is tokens[i]."""
    return 5.0 * jax.nn.one_hot(jnp.array([tokens]), VOCAB, dtype=jnp.float32)


def proposal(*tokens, candidates=None):
    return Proposal(jnp.array([tokens], jnp.int32), candidates)


def certain(tokens):
    """Candidates that give each draft of tokens [B, W] probability 1, with padding slots."""
    drafts = tokens[:, 1:]
    ids = jnp.stack([jnp.maximum(drafts, 0), jnp.full_like(drafts, -1), jnp.maximum(drafts, 0)], axis=-1)
    return Candidates(ids, jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0]), ids.shape))


def random_candidates(rng, batch):
    """Drawn drafts with the distributions that they were drawn from: tokens [B, W], anchor 0."""
    ids = np.argsort(rng.random((batch, WIDTH - 1, VOCAB)), axis=-1)[..., :CHOICES]
    probs = rng.dirichlet(np.full(CHOICES, 0.5), size=(batch, WIDTH - 1))
    slots = (probs.cumsum(-1) < rng.random((batch, WIDTH - 1, 1))).sum(-1, keepdims=True).clip(max=CHOICES - 1)
    drafts = np.take_along_axis(ids, slots, axis=-1)[..., 0]
    tokens = jnp.asarray(np.pad(drafts, ((0, 0), (1, 0))), jnp.int32)
    return tokens, Candidates(jnp.asarray(ids, jnp.int32), jnp.asarray(probs, jnp.float32))


@pytest.mark.parametrize(
    ("drafts", "count", "emitted"),
    [
        ((1, 2, 3), 4, [1, 2, 3, 4]),
        ((1, 2, 8), 3, [1, 2, 3, -1]),
        ((8, 2, 3), 1, [1, -1, -1, -1]),
        ((1, -1, 3), 2, [1, 2, -1, -1]),
        ((-1, -1, -1), 1, [1, -1, -1, -1]),
    ],
)
@pytest.mark.parametrize("drawn", [False, True])
def test_greedy_keeps_the_longest_prefix_that_agrees(drafts, count, emitted, drawn):
    given = proposal(0, *drafts)
    if drawn:
        given = Proposal(given.tokens, certain(given.tokens))
    found = _accept(given, favouring(1, 2, 3, 4), positions(1))
    assert int(found.count[0]) == count and int(found.bonus[0]) == emitted[count - 1]
    np.testing.assert_array_equal(found.emitted[0], emitted)


def test_plain_decoding_emits_one_token():
    found = _accept(plain_proposal(jnp.array([3], jnp.int32)), favouring(7), positions(1)[:, :1])
    assert found.count.tolist() == [1] and found.emitted.tolist() == [[7]]


def test_greedy_ties_go_to_the_lowest_id():
    tied = jnp.zeros((1, WIDTH, VOCAB)).at[..., jnp.array([3, 6])].set(1.0)
    assert _accept(proposal(0, 3, 3, 6), tied, positions(1)).emitted.tolist() == [[3, 3, 3, -1]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_greedy_requests_compare_whatever_the_drafts_were_drawn_from(seed):
    """In a batch that samples, and with drafts that q holds impossible, a greedy request still only compares."""
    rng = np.random.default_rng(seed)
    tokens, candidates = random_candidates(rng, 6)
    logits = jnp.asarray(rng.integers(0, 3, (6, WIDTH, VOCAB)), jnp.float32)
    agreeing = rng.random((6, WIDTH - 1)) < 0.7
    tokens = tokens.at[:, 1:].set(jnp.where(agreeing, jnp.argmax(logits[:, :-1], -1), tokens[:, 1:]))
    mixed = Sampling.build(6, VOCAB, temperature=[0.0, 1.0] * 3, top_p=0.9, seed=seed)
    found = _accept(Proposal(tokens, candidates), logits, positions(6), mixed)
    alone = _accept(Proposal(tokens), logits, positions(6))
    np.testing.assert_array_equal(found.count[::2], alone.count[::2])
    np.testing.assert_array_equal(found.emitted[::2], alone.emitted[::2])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), options=st.sampled_from([{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}]))
def test_nothing_filtered_is_ever_emitted(seed, options):
    rng = np.random.default_rng(seed)
    batch = 64
    tokens, candidates = random_candidates(rng, batch)
    penalties = {"presence_penalty": 1.0, "repetition_penalty": 1.2}
    sampling = Sampling.build(batch, VOCAB, temperature=1.0, seed=seed % 2**32, **options, **penalties)
    history = History.start(tokens, jnp.ones(batch, jnp.int32), VOCAB)
    logits = jnp.asarray(rng.normal(size=(batch, WIDTH, VOCAB)) * 3, jnp.float32)
    log_p = np.asarray(_distribution(logits, sampling, history, tokens))
    for given_proposal in (Proposal(tokens, candidates), Proposal(tokens)):
        found = _accept(given_proposal, logits, positions(batch), sampling, history)
        emitted, kept = np.asarray(found.emitted), np.arange(WIDTH) < np.asarray(found.count)[:, None]
        assert np.all(kept[:, 0]) and np.all(emitted[~kept] == -1)
        assert np.all(np.isfinite(np.take_along_axis(log_p, emitted[..., None], -1)[..., 0][kept]))
        accepted = kept[:, 1:]
        np.testing.assert_array_equal(emitted[:, :-1][accepted], np.asarray(tokens)[:, 1:][accepted])


def test_a_draft_from_the_targets_own_distribution_is_always_accepted():
    rng = np.random.default_rng(0)
    batch = 500
    sampling = Sampling.build(batch, VOCAB, temperature=0.8, top_k=6, seed=1)
    logits = jnp.asarray(rng.normal(size=(batch, WIDTH, VOCAB)) * 2, jnp.float32)
    log_p = _distribution(logits, sampling)
    drafts = jnp.argmax(log_p + rng.gumbel(size=log_p.shape), axis=-1).astype(jnp.int32)[:, :-1]
    ids = jnp.broadcast_to(jnp.arange(VOCAB, dtype=jnp.int32), (batch, WIDTH - 1, VOCAB))
    candidates = Candidates(ids, jnp.exp(log_p[:, :-1]))
    found = _accept(Proposal(jnp.pad(drafts, ((0, 0), (1, 0))), candidates), logits, positions(batch), sampling)
    assert np.all(np.asarray(found.count) == WIDTH)


def test_the_rate_of_acceptance_is_the_overlap_of_the_distributions():
    """sum min(p, q), the most that any lossless rule can reach with one draft."""
    batch = 20000
    p = np.array([0.05, 0.15, 0.3, 0.5, 0, 0, 0, 0, 0])
    q = np.array([0.6, 0.2, 0.2])
    drafts = jnp.asarray(np.random.default_rng(0).choice(3, size=(batch, WIDTH - 1), p=q), jnp.int32)
    candidates = Candidates(
        jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32), (batch, WIDTH - 1, 3)),
        jnp.broadcast_to(jnp.asarray(q, jnp.float32), (batch, WIDTH - 1, 3)),
    )
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (batch, WIDTH, VOCAB))
    sampling = Sampling.build(batch, VOCAB, temperature=1.0, seed=list(range(batch)))
    tokens = jnp.pad(drafts, ((0, 0), (1, 0)))
    drawn = np.asarray(_accept(Proposal(tokens, candidates), logits, positions(batch), sampling).count) > 1
    overlap = np.minimum(p[:3], q).sum()
    assert abs(drawn.mean() - overlap) < 4 * np.sqrt(overlap * (1 - overlap) / batch)
    compared = np.asarray(_accept(Proposal(tokens), logits, positions(batch), sampling).count) > 1
    overlap = (q * p[:3]).sum()
    assert abs(compared.mean() - overlap) < 4 * np.sqrt(overlap * (1 - overlap) / batch)


def test_a_draft_that_q_cannot_have_drawn_is_refused():
    tokens = jnp.array([[0, 1, 2, 3]], jnp.int32)
    elsewhere = Candidates(jnp.full((1, WIDTH - 1, 1), 8, jnp.int32), jnp.ones((1, WIDTH - 1, 1)))
    sampling = Sampling.build(1, VOCAB, temperature=1.0)
    assert _accept(Proposal(tokens, elsewhere), favouring(1, 2, 3, 4), positions(1), sampling).count.tolist() == [1]


def test_a_request_does_not_depend_on_its_batch():
    rng = np.random.default_rng(5)
    batch = 4
    tokens, candidates = random_candidates(rng, batch)
    logits = jnp.asarray(rng.normal(size=(batch, WIDTH, VOCAB)), jnp.float32)
    options = {
        "temperature": [0.0, 1.0, 1.3, 1.0],
        "top_k": [0, 0, 4, 0],
        "top_p": [1.0, 1.0, 0.8, 0.6],
        "frequency_penalty": [2.0, 0.0, 0.0, 0.5],
        "seed": [3, 3, 4, 2**32 - 1],
    }
    history = History.start(tokens, jnp.ones(batch, jnp.int32), VOCAB)
    together = Sampling.build(batch, VOCAB, **options)
    first = positions(batch) + 7 * jnp.arange(batch, dtype=jnp.int32)[:, None]
    for whole in (Proposal(tokens, candidates), Proposal(tokens)):
        everyone = _accept(whole, logits, first, together, history)
        for b in range(batch):
            one = jax.tree.map(lambda array, b=b: array[b : b + 1], (whole, logits, first, history))
            alone = Sampling.build(1, VOCAB, **{name: values[b] for name, values in options.items()})
            found = _accept(*one[:3], alone, one[3])
            assert found.count[0] == everyone.count[b]
            np.testing.assert_array_equal(found.emitted[0], everyone.emitted[b])


def test_no_host_in_a_round():
    tokens, candidates = random_candidates(np.random.default_rng(0), 2)
    sampling = Sampling.build(2, VOCAB, temperature=1.0, top_p=0.9, frequency_penalty=1.0)
    history = History.start(tokens, jnp.ones(2, jnp.int32), VOCAB)
    arguments = Proposal(tokens, candidates), jnp.zeros((2, WIDTH, VOCAB)), positions(2), sampling, history
    expected = _accept(*arguments)
    with jax.transfer_guard("disallow"):
        found = _accept(*arguments)
    np.testing.assert_array_equal(found.emitted, expected.emitted)
