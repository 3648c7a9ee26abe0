"""Every rule against numpy in float64 and against transformers; nothing that depends on the neighbours in the batch."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dflash_jax.decoding.sampling import History, Sampling, adjusted, row_counts
from dflash_jax.decoding.shortlist import everything
from dflash_jax.errors import InputError
from tests.decoding import reference

VOCAB, WIDTH = 12, 3
PROMPT, GENERATED = [3, 3, 5], [4, 5]

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
BUSY = {
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.8,
    "min_p": 0.1,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {1: 3.0},
}

# Multiples of 1/32: fp32 holds them exactly, so logits that are equal (or not) stay so.
logit_rows = st.lists(st.lists(st.integers(-640, 640), min_size=VOCAB, max_size=VOCAB), min_size=WIDTH, max_size=WIDTH)
logit_rows = logit_rows.map(lambda rows: np.array(rows) / 32)
filters = {
    "top_k": st.integers(0, VOCAB + 2),
    "top_p": st.sampled_from([1e-6, 0.2, 0.7, 0.95, 1.0]),
    "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
}
penalties = {
    "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    "presence_penalty": st.sampled_from([-2.0, 0.0, 0.4, 2.0]),
    "frequency_penalty": st.sampled_from([-0.5, 0.0, 0.3, 2.0]),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 2.0, 100.0])),
}
temperatures = {"temperature": st.sampled_from([0.3, 1.0, 1.7])}
drafted = st.lists(st.integers(-1, VOCAB - 1), min_size=WIDTH, max_size=WIDTH)


def build(*requests, seed=0):
    """Sampling of requests that each name only what differs from the defaults."""
    named = [DEFAULTS | request for request in requests]
    return Sampling.build(len(requests), VOCAB, seed=seed, **{name: [one[name] for one in named] for name in DEFAULTS})


def start(batch):
    """History of PROMPT (with padding behind it) and GENERATED, for each request."""
    prompts = jnp.array([[*PROMPT, 9]] * batch, jnp.int32)
    history = History.start(prompts, jnp.full(batch, len(PROMPT), jnp.int32), VOCAB)
    return history.add(jnp.array([[*GENERATED, 8, -1]] * batch), jnp.array([[True, True, False, True]] * batch))


def batched(rows, batch=1):
    return jnp.broadcast_to(jnp.asarray(rows, jnp.float32), (batch, WIDTH, VOCAB))


def distribution(logits, sampling, *rest):
    return everything(logits, sampling, *rest).distribution(sampling)


def draw(logits, positions, sampling, *rest):
    return everything(logits, sampling, *rest).draw(positions, sampling)


_adjusted, _distribution, _draw = jax.jit(adjusted), jax.jit(distribution), jax.jit(draw)


# As users compile it, and not with the less effort of conftest.py: that one may sum a row in another order.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
def _evaluated(logits, positions, sampling, history, tokens):
    return distribution(logits, sampling, history, tokens), draw(logits, positions, sampling, history, tokens)


def evaluate(rows, request, tokens=(0, -1, -1)):
    """Adjusted logits and probabilities [W, V] of a request beside one that needs every step of the plan."""
    sampling, inputs = build(request, BUSY), (start(2), jnp.array([tokens] * 2, jnp.int32))
    values = _adjusted(batched(rows, 2), sampling, *inputs), _distribution(batched(rows, 2), sampling, *inputs)
    return np.asarray(values[0][0]), np.exp(np.asarray(values[1][0], np.float64))


def near_an_edge(scaled, request):
    """Whether rounding decides if a token stays: a cut of top-p or min-p passes within 1e-4 of it."""
    top_k = request.get("top_k", 0)
    scaled = np.where(scaled < np.sort(scaled)[-top_k], -np.inf, scaled) if 0 < top_k < VOCAB else scaled
    probabilities = reference.softmax(scaled)
    by_mass = np.abs(reference.above(probabilities) - request.get("top_p", 1.0)) < 1e-4
    by_ratio = np.abs(probabilities / probabilities.max() - request.get("min_p", 0.0)) < 1e-4 * request.get(
        "min_p", 0.0
    )
    return (request.get("top_p", 1.0) < 1 and by_mass.any()) or by_ratio.any()


@settings(max_examples=60, deadline=None)
@given(rows=logit_rows, request=st.fixed_dictionaries(temperatures, optional=filters))
def test_filters_agree_with_numpy(rows, request):
    assume(not any(near_an_edge(row / request["temperature"], request) for row in rows))
    _, found = evaluate(rows, request)
    expected = [reference.probabilities(row, request) for row in rows]
    np.testing.assert_allclose(found, expected, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(rows=logit_rows, request=st.fixed_dictionaries({}, optional=penalties), tokens=drafted)
def test_penalties_agree_with_numpy_on_each_rows_own_history(rows, request, tokens):
    found, greedy = evaluate(rows, request, tokens)
    for i, row in enumerate(rows):
        seen = GENERATED + [token for token in tokens[1 : i + 1] if token >= 0]
        expected = reference.penalised(row, request, PROMPT, seen)
        np.testing.assert_allclose(found[i], expected, rtol=1e-6, atol=1e-5)
        np.testing.assert_array_equal(greedy[i], np.eye(VOCAB)[np.argmax(found[i])])


@settings(max_examples=40, deadline=None)
@given(rows=logit_rows, request=st.fixed_dictionaries(temperatures, optional=filters | penalties), tokens=drafted)
def test_all_rules_together_agree_with_numpy(rows, request, tokens):
    _, found = evaluate(rows, request, tokens)
    for i, row in enumerate(rows):
        seen = GENERATED + [token for token in tokens[1 : i + 1] if token >= 0]
        after = reference.penalised(row, request, PROMPT, seen)
        # Penalties bring logits that are equal but for rounding, which float64 tells apart and fp32 need not.
        gaps = np.diff(np.unique(after))
        assume(gaps.size == 0 or gaps.min() > 1e-3)
        assume(not near_an_edge(after / request["temperature"], request))
        np.testing.assert_allclose(found[i], reference.filtered(after, request), atol=1e-4)


@pytest.mark.torch
@settings(max_examples=40, deadline=None)
@given(rows=logit_rows, request=st.fixed_dictionaries(temperatures, optional=filters))
def test_filters_agree_with_transformers(rows, request):
    torch, processors = pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")
    # Transformers leaves to an unstable sort which of two equal logits at the edge of top-p goes.
    assume(all(len(np.unique(row)) == VOCAB for row in rows))
    assume(not any(near_an_edge(row / request["temperature"], request) for row in rows))
    chain = [processors.TemperatureLogitsWarper(request["temperature"])]
    if request.get("top_k"):
        chain.append(processors.TopKLogitsWarper(request["top_k"]))
    chain += [
        processors.TopPLogitsWarper(request.get("top_p", 1.0)),
        processors.MinPLogitsWarper(request.get("min_p", 0.0)),
    ]
    scores = torch.tensor(rows, dtype=torch.float64)
    for processor in chain:
        scores = processor(None, scores)
    _, found = evaluate(rows, request)
    np.testing.assert_allclose(found, torch.softmax(scores, -1).numpy(), atol=2e-6)


@pytest.mark.torch
@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_agrees_with_transformers(penalty):
    torch, processors = pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")
    rows = np.random.default_rng(0).normal(size=(WIDTH, VOCAB)) * 4
    tokens = [4, 7, 0]
    found, _ = evaluate(rows, {"repetition_penalty": penalty}, tokens)
    for i, row in enumerate(rows):
        ids = torch.tensor([[*PROMPT, *GENERATED, *tokens[1 : i + 1]]])
        scores = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.tensor(row[None], dtype=torch.float32))
        np.testing.assert_allclose(found[i], scores[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 50, 4999, 5000, 6000])
def test_top_k_of_a_large_vocabulary(top_k):
    logits = np.random.default_rng(0).normal(size=(2, 1, 5000)).astype(np.float32) * 5
    found = distribution(jnp.asarray(logits), Sampling.build(2, 5000, temperature=1.0, top_k=top_k))
    for row, kept in zip(logits[:, 0], np.isfinite(found)[:, 0], strict=True):
        np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(np.argsort(-row)[:top_k]))


def test_masked_logits_stay_out():
    """Tokens at -inf, as a grammar leaves them, are never drawn whatever the settings add or multiply."""
    rows = np.where(np.arange(VOCAB) % 4 == 1, 1.0, -np.inf) * np.ones((WIDTH, 1))
    for request in ({"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, BUSY | {"logit_bias": {0: 100.0}}):
        _, found = evaluate(rows, request)
        assert np.all(found[:, np.arange(VOCAB) % 4 != 1] == 0)
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3, 3e38])
def test_extreme_temperatures(temperature):
    rows = np.random.default_rng(0).normal(size=(WIDTH, VOCAB)) * 100
    _, found = evaluate(rows, {"temperature": temperature})
    expected = np.full((WIDTH, VOCAB), 1 / VOCAB) if temperature > 1 else np.eye(VOCAB)[rows.argmax(-1)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_greedy_ties_go_to_the_lowest_id():
    rows = np.zeros((WIDTH, VOCAB))
    rows[:, [4, 9]] = 2.0
    positions = jnp.zeros((2, WIDTH), jnp.int32)
    sampling = build({}, {"temperature": 1.0})
    assert np.all(np.asarray(_draw(batched(rows, 2), positions, sampling)[0]) == 4)
    assert np.all(np.asarray(_draw(batched(rows, 2), positions, None)) == 4)


@given(
    tokens=drafted, emitted=st.lists(st.integers(-1, VOCAB - 1), max_size=4), mask=st.lists(st.booleans(), min_size=4)
)
@settings(max_examples=40, deadline=None)
def test_history_by_brute_force(tokens, emitted, mask):
    emitted = [*emitted, -1, -1, -1, -1][:4]
    history = start(1).add(jnp.array([emitted]), jnp.array([mask[:4]]))
    generated = GENERATED + [token for token, kept in zip(emitted, mask, strict=False) if kept and token >= 0]
    np.testing.assert_array_equal(np.flatnonzero(history.prompt_seen[0]), sorted(set(PROMPT)))
    rows = row_counts(history, jnp.array([tokens], jnp.int32))
    for i in range(WIDTH):
        expected = Counter(generated + [token for token in tokens[1 : i + 1] if token >= 0])
        np.testing.assert_array_equal(rows[0, i], [expected[token] for token in range(VOCAB)])


def test_a_request_does_not_depend_on_its_batch_bit_for_bit():
    """Each request alone, with the smallest plan that serves it, against all together, with every step compiled."""
    requests = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.3, "top_p": 0.7},
        {"frequency_penalty": 1.0, "presence_penalty": 0.3},
        {"temperature": 1.0, "repetition_penalty": 1.4},
        {"logit_bias": {2: 5.0, 3: -4.0}},
        BUSY,
    ]
    rng = np.random.default_rng(3)
    seeds = [int(seed) for seed in rng.integers(0, 2**32, len(requests))]
    logits = jnp.asarray(rng.normal(size=(len(requests), WIDTH, VOCAB)) * 3, jnp.float32)
    tokens = jnp.asarray(rng.integers(-1, VOCAB, (len(requests), WIDTH)), jnp.int32)
    positions = jnp.asarray(rng.integers(0, 1000, (len(requests), 1)) + np.arange(WIDTH), jnp.int32)
    together = build(*requests, seed=seeds)
    inputs = start(len(requests)), tokens
    everyone = _evaluated(logits, positions, together, *inputs)
    plans = set()
    for i, request in enumerate(requests):
        alone, one = build(request, seed=[seeds[i]]), slice(i, i + 1)
        plans.add(alone and alone.plan)
        inputs = start(1), tokens[one]
        found = _evaluated(logits[one], positions[one], alone, *inputs)
        np.testing.assert_array_equal(found[0], everyone[0][one])
        np.testing.assert_array_equal(found[1], everyone[1][one])
    assert len(plans) == len(requests)


@pytest.mark.parametrize("request_", [BUSY, {"temperature": 1.0}])
def test_a_row_does_not_depend_on_the_width_bit_for_bit(request_):
    """The last row alone, with what it has seen put into the history, and that row among others."""
    rng = np.random.default_rng(4)
    logits = jnp.asarray(rng.normal(size=(64, WIDTH, VOCAB)) * 3, jnp.float32)
    tokens = jnp.asarray(rng.integers(-1, VOCAB, (64, WIDTH)), jnp.int32)
    positions = jnp.asarray(rng.integers(0, 1000, (64, 1)) + np.arange(WIDTH), jnp.int32)
    sampling, row = build(*[request_] * 64), slice(WIDTH - 1, WIDTH)
    wide = _evaluated(logits, positions, sampling, start(64), tokens)
    seen = start(64).add(tokens[:, 1:], jnp.ones((64, WIDTH - 1), bool))
    narrow = _evaluated(logits[:, row], positions[:, row], sampling, seen, tokens[:, row])
    np.testing.assert_array_equal(narrow[0], wide[0][:, row])
    np.testing.assert_array_equal(narrow[1], wide[1][:, row])


def test_a_plan_computes_only_what_it_needs():
    def operations(*requests):
        arguments = batched(np.zeros((WIDTH, VOCAB))), jnp.zeros((1, WIDTH), jnp.int32), build(*requests)
        return str(jax.make_jaxpr(draw)(*arguments, start(1), jnp.zeros((1, WIDTH), jnp.int32)))

    assert "reduce_min" in operations({}) and "exp" not in operations({}) and "random_fold_in" not in operations({})
    assert "scan" in operations({"temperature": 1.0, "top_k": 2}) and "scan" not in operations({"temperature": 1.0})
    assert "random_fold_in" in operations({"temperature": 1.0})
    assert "cumsum" in operations({"presence_penalty": 1.0}) and "cumsum" not in operations({"temperature": 1.0})
    assert not any("sort[" in operations(request) for request in ({}, {"temperature": 1.0}, BUSY))


def test_nothing_to_sample_is_none():
    assert Sampling.build(4, VOCAB, top_k=3, top_p=0.5, seed=7, logit_bias={}) is None
    assert build({}, BUSY).plan == build(BUSY).plan


def test_penalties_without_history_are_refused():
    with pytest.raises(ValueError, match="history"):
        adjusted(batched(np.zeros((WIDTH, VOCAB))), build(BUSY))


def test_seeds_of_a_batch():
    """One seed for the batch is each request's, so that an answer does not depend on its place; a list is as it is."""
    scalar = Sampling.build(3, VOCAB, temperature=1.0, seed=2**32 - 1)
    np.testing.assert_array_equal(scalar.seed, [2**32 - 1] * 3)
    listed = Sampling.build(3, VOCAB, temperature=1.0, seed=[5, 0, 7])
    np.testing.assert_array_equal(listed.seed, [5, 0, 7])


def test_arrays_and_numpy_scalars_are_accepted():
    sampling = Sampling.build(2, VOCAB, temperature=np.array([0.5, 1.0]), top_k=np.int64(3), top_p=jnp.array(0.5))
    np.testing.assert_array_equal(sampling.temperature, [0.5, 1.0])
    np.testing.assert_array_equal(sampling.top_k, [3, 3])
    np.testing.assert_array_equal(sampling.top_p, [0.5, 0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; give a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": [1.0, float("inf")]}, "temperature is inf"),
        ({"temperature": 1e39}, "temperature is 1e"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": [1.0]}, "temperature has 1 entries for 2 requests"),
        ({"top_k": -1}, "top_k is -1; give an integer"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"top_p": 0.0}, "top_p is 0.0; give a number in (0, 1]"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": -0.1}, "min_p is -0.1; give a number in [0, 1]"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; give a number"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; give a number in [-2, 2]"),
        ({"frequency_penalty": [0.0, -3]}, "frequency_penalty is -3; give a number in [-2, 2]"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias names token 12; give ids from 0 to 11"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias names token '3'"),
        ({"logit_bias": [{-1: 1.0}, None]}, "logit_bias names token -1"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias of token 3 is inf"),
        ({"logit_bias": [1.0, 2.0]}, "logit_bias is 1.0; give {token id: bias}"),
        ({"logit_bias": [None]}, "logit_bias has 1 entries for 2 requests"),
        ({"seed": -1}, "seed is -1; give an integer from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_bad_settings_are_refused_in_one_line(options, message):
    with pytest.raises(InputError) as caught:
        Sampling.build(2, VOCAB, **({"temperature": 1.0} | options))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value) and "; give " in str(caught.value)
