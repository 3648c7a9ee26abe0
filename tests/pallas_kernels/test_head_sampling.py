"""The definition against float64, its noise against jax's own, and the whole against its shards."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats

from pallas_kernels.head_sampling import Projection, Samples, combine, head_sampling, noise, reference
from tests.pallas_kernels.head_cases import draw, drawn, truth
from tests.statistics import THRESHOLD, chi_square

KEYS = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (5, 2)), jnp.uint32)


def sample(case):
    return jax.jit(partial(reference.sample, **case.static))(*case.positional)


def equal(found, expected):
    for name in vars(expected):
        one, other = getattr(found, name), getattr(expected, name)
        if name == "total" and other is not None:
            np.testing.assert_allclose(one, other, rtol=1e-5)
        elif other is None:
            assert one is None, name
        else:
            np.testing.assert_array_equal(one, other, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(case=drawn)
def test_reference_equals_float64(case):
    logits, ids = truth(case)
    found, each = sample(case), np.arange(len(logits))[:, None]
    # fp32 logits decide between those that a soft cap leaves a rounding apart.
    rounded = np.asarray(reference.logits(case.static["projection"], *case.positional[:2]))
    rounded = np.where(np.isfinite(logits), rounded, -np.inf)
    np.testing.assert_allclose(rounded, logits, rtol=1e-5, atol=1e-6)
    order = np.argsort(-rounded, axis=1, kind="stable")[:, : case.static["slots"]]
    np.testing.assert_array_equal(found.ids, ids[order])
    np.testing.assert_allclose(found.values, logits[each, order], rtol=1e-5, atol=1e-6)
    if (wanted := case.arrays["given"]) is not None:
        place = np.asarray(wanted) - ids[0]
        inside = (place >= 0) & (place < len(ids))
        expected = np.where(inside, logits[each, np.where(inside, place, 0)], -np.inf)
        np.testing.assert_allclose(found.given, expected, rtol=1e-5, atol=1e-6)
    if found.total is not None:
        temperature = np.asarray(case.arrays["temperature"], np.float64)[:, None]
        total = np.exp((logits - logits.max(1, keepdims=True)) / temperature).sum(1)
        usual = np.ravel(temperature) > 0.1  # else a rounding of the largest logit counts
        np.testing.assert_allclose(np.asarray(found.total)[usual], total[usual], rtol=1e-4)
    if found.drawn_ids is not None:
        assert not np.any(np.asarray(found.drawn_ids) == np.asarray([[-9]] if wanted is None else wanted))


@pytest.mark.parametrize("shape", [(1, 24), (2, 24), (3, 2, 24), (reference.FEW, 24), (reference.FEW + 1, 24)])
@pytest.mark.parametrize("vocab", [3 * reference.PARTS, 3 * reference.PARTS + 1])
def test_a_table_in_parts_gives_the_same_logits(shape, vocab):
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape, (vocab, 24)))
    call = jax.jit(partial(reference.logits, Projection("vd")))
    np.testing.assert_allclose(call(hidden, table), np.asarray(hidden) @ np.asarray(table).T, rtol=1e-5, atol=1e-5)
    parts = f"[{reference.PARTS},3,24]"
    few = 1 < np.prod(shape[:-1]) <= reference.FEW and vocab % reference.PARTS == 0
    assert (parts in str(jax.make_jaxpr(call)(hidden, table))) == few


def test_noise_is_that_of_jax():
    """The numbers of a seed are a promise: a request may be repeated after an update."""
    for key in KEYS:
        wrapped = jax.random.wrap_key_data(key, impl="threefry2x32")
        expected = jax.random.bits(wrapped, (1000,), jnp.uint32)
        np.testing.assert_array_equal(noise.threefry(key[:1], key[1:], jnp.arange(1000, dtype=jnp.uint32)), expected)


def test_unit_numbers_are_rounded_once():
    bits = np.concatenate([np.random.default_rng(0).integers(0, 2**32, 10000), [0, 1, 2**24 + 1, 2**32 - 1]])
    found = noise.unit(jnp.asarray(bits, jnp.uint32))
    expected = (bits.astype(np.uint32).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    np.testing.assert_array_equal(found, np.minimum(expected, np.float32(1 - 2.0**-24)))
    assert np.all((np.asarray(found) > 0) & (np.asarray(found) < 1))
    assert np.all(np.isfinite(noise.gumbel_of(jnp.asarray(bits, jnp.uint32))))


def test_noise_has_the_law():
    ids = jnp.broadcast_to(jnp.arange(2000, dtype=jnp.int32), (5, 2000))
    assert stats.kstest(np.ravel(noise.gumbel(KEYS, ids)), "gumbel_r").pvalue > 1e-3


@settings(max_examples=15, deadline=None)
@given(case=drawn)
def test_a_row_does_not_depend_on_the_others(case):
    everyone = sample(case)
    chosen = np.random.default_rng(1).permutation(case.arrays["hidden"].shape[0])[:3]
    equal(sample(case.rows(chosen)), jax.tree.map(lambda x: x[chosen], everyone))


def in_shards(case, shards):
    """The vocabulary cut into equal parts, one after the other."""
    axis = 1 if case.static["projection"].layout == "dv" else 0
    parts = jnp.split(case.arrays["weight"], shards, axis)
    size = parts[0].shape[axis]
    hidden, _, *rows, start = case.positional
    found = [
        reference.sample(hidden, part, *rows, start + jnp.int32(i * size), **case.static)
        for i, part in enumerate(parts)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *found)
    return combine(stacked, case.arrays["temperature"], case.arrays["keys"], case.static["slots"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("slots", "layout"), [(1, "dv"), (7, "dv"), (64, "vd")])
def test_shards_together_are_the_whole(seed, slots, layout):
    # The last shard is all padding in the one, and none is in the other.
    padded = 130 if seed % 2 else 0
    case = draw(seed, 9, 512, slots=slots, layout=layout, given=3, padded=padded, start=0)
    equal(in_shards(case, 4), sample(case))


def test_devices_gather_and_combine_for_themselves():
    """Every shard finds its first id, and comes to the samples of the whole."""
    case = draw(3, 6, 128, given=2, slots=4, start=0)
    hidden, weight, wanted, temperature, keys, _ = case.positional
    static = case.static | {"axis_name": ("vocab",)}
    call = jax.vmap(
        lambda part: head_sampling(hidden, part, wanted, temperature, keys, **static),
        in_axes=1,
        axis_name="vocab",
    )
    found = jax.jit(call)(weight.reshape(8, 4, 32))
    for shard in range(4):
        equal(jax.tree.map(lambda x, shard=shard: x[shard], found), sample(case))


@pytest.mark.parametrize("shards", [1, 4])
def test_draws_have_the_distribution_of_the_logits(shards):
    """With the given tokens beside it the draw is one from softmax(logits / temperature)."""
    count, vocab = 20000, 12
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=4), rng.normal(size=(4, vocab))
    wanted = jnp.broadcast_to(jnp.asarray([7, 2], jnp.int32), (count, 2))
    keys = jnp.asarray(rng.integers(0, 2**32, (count, 2)), jnp.uint32)
    arrays = {
        "hidden": jnp.broadcast_to(jnp.asarray(hidden, jnp.float32), (count, 4)),
        "weight": jnp.asarray(weight, jnp.float32),
        "given": wanted,
        "temperature": jnp.full(count, 0.7),
        "keys": keys,
        "start": jnp.int32(0),
    }
    case = draw(0, 1, vocab).__class__(arrays, {"projection": Projection("dv"), "slots": 1, "vocab": None})
    found = in_shards(case, shards)
    p = np.exp(hidden @ weight / 0.7)
    p /= p.sum()
    rest = np.where(np.isin(np.arange(vocab), [7, 2]), 0, p)
    counts = np.bincount(np.ravel(found.drawn_ids), minlength=vocab)
    assert chi_square(counts, rest / rest.sum()) > THRESHOLD
    ids = jnp.concatenate([found.drawn_ids, wanted], 1)
    logits = jnp.concatenate([found.drawn_logits, found.given], 1)
    chosen = reference.best(logits / 0.7 + noise.gumbel(keys, ids), ids)
    assert chi_square(np.bincount(chosen, minlength=vocab), p) > THRESHOLD
    log_p = (found.given - found.values) / 0.7 - jnp.log(found.total)[:, None]
    np.testing.assert_allclose(np.exp(log_p[0]), p[[7, 2]], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keys": KEYS}, "temperature"), ({"slots": 99}, "slots is 99"), ({"slots": 0}, "slots is 0")],
)
def test_what_cannot_be_done_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        head_sampling(jnp.zeros((5, 4)), jnp.zeros((4, 9)), projection=Projection("dv"), **options)
    with pytest.raises(ValueError, match="4 columns and the vd matrix takes 9"):
        head_sampling(jnp.zeros((5, 4)), jnp.zeros((4, 9)), projection=Projection("vd"))


def test_samples_are_a_pytree():
    assert len(jax.tree.leaves(Samples(*jnp.zeros((6, 1))))) == 6
