"""The TPU kernels under the TPU interpreter, which poisons what was never written; their traffic; their lowering."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta import (
    cases,
    gated_delta_block,
    gated_delta_prefill,
    reference,
    tpu,
    tpu_prefill,
    tpu_rows,
)
from pallas_kernels.gated_delta.pending import Pending
from tests.pallas_kernels.gated_delta_rounds import Rounds, Shape, random_parents, rows, spoil, weights
from tests.pallas_kernels.traffic import block_transfers, kernels

HK = 2
TILES = {"heads": 1, "chunk": 8}  # two groups of heads, several chunks
INTERPRET = pltpu.InterpretParams()
block = jax.jit(partial(tpu.gated_delta_block, tiles=TILES, interpret=INTERPRET))
prefill = jax.jit(partial(tpu_prefill.gated_delta_prefill, tiles=TILES, interpret=INTERPRET))
right_block, right_prefill = jax.jit(reference.gated_delta_block), jax.jit(reference.gated_delta_prefill)
DTYPES = {"float32": (jnp.float32, 2e-5), "bfloat16": (jnp.bfloat16, 2e-2)}
drawn = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("tree", [False, True])
def test_rounds_of_random_paths_equal_the_rule_row_by_row(tree):
    run = Rounds(Shape(), 6, np.random.default_rng(1), block, prefill)
    run.run_prefill(20, [20, 11])
    for _ in range(3):
        run.run_block(6, tree)
    run.run_prefill(20, [3, 0])
    run.run_block(6, tree)


@pytest.mark.timeout(200)
def test_a_state_that_decays_at_once_stays_finite():
    run = Rounds(Shape(), 6, np.random.default_rng(0), block, prefill, fast_decay=True)
    run.run_prefill(20, [20, 7])
    run.run_block(6, False)
    run.run_block(6, True)


def given_arrays(seed: int, width: int, pending: int, dtype, **kw) -> list:
    """Arguments in which half of the pending rows do not exist, and hold NaN."""
    rng, shape = np.random.default_rng(seed), Shape(Hk=HK, **kw)
    normal = lambda *size: jnp.asarray(rng.normal(size=size), dtype)  # noqa: E731
    weight = np.where(rng.uniform(size=(shape.B, shape.Hv, pending)) < 0.5, 0, rng.uniform(size=pending))
    empty = Pending(
        k=normal(shape.B, shape.Hk, pending, shape.Dk),
        u=normal(shape.B, shape.Hv, pending, shape.Dv),
        weight=jnp.asarray(weight, jnp.float32),
        fold=jnp.asarray(rng.uniform(size=(shape.B, shape.Hv)), jnp.float32),
    )
    state = normal(shape.B, shape.Hv, shape.Dk, shape.Dv).astype(jnp.float32)
    tail = normal(shape.B, shape.taps - 1, shape.Hk, shape.C)
    taps, A_log, dt_bias = map(jnp.asarray, weights(shape, rng))
    mixed = (jnp.asarray(x, dtype) for x in rows(shape, rng, width))
    return [state, spoil(empty), tail, *mixed, taps.astype(dtype), A_log, dt_bias]


def close(got, want, tolerance: float) -> None:
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == two.dtype
        one, two = (np.asarray(x).astype(np.float32) for x in (one, two))
        np.testing.assert_allclose(one, two, atol=tolerance * max(1.0, np.abs(two).max(initial=0)))


@pytest.mark.timeout(200)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "pending"), [(1, 3), (20, 8)])
@drawn
@given(seed=st.integers(0, 2**20), back=st.integers(0, 6))
def test_block_equals_the_reference(dtype, width, pending, seed, back):
    dtype, tolerance = DTYPES[dtype]
    arguments = given_arrays(seed, width, pending, dtype)
    parents = random_parents(Shape(), np.random.default_rng(seed), width, back) if back else None
    end = () if parents is None else (jnp.asarray(parents),)
    close(block(*arguments, *end), right_block(*arguments, *end), tolerance)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("dtype", DTYPES)
@drawn
@given(seed=st.integers(0, 2**20), counts=st.tuples(st.integers(0, 20), st.integers(0, 20)))
def test_prefill_equals_the_reference(dtype, seed, counts):
    dtype, tolerance = DTYPES[dtype]
    arguments, count = given_arrays(seed, 20, 4, dtype), jnp.asarray(counts)
    unused = np.arange(20)[None] >= np.array(counts)[:, None]
    for i in range(3, 6):
        x = arguments[i]
        spoilt = np.where(unused.reshape(unused.shape + (1,) * (x.ndim - 2)), np.nan, np.asarray(x))
        arguments[i] = jnp.asarray(spoilt, dtype)
    (out, state), (right, state_right) = prefill(*arguments, count), right_prefill(*arguments, count)
    close(state, state_right, tolerance)
    out, right = np.asarray(out), np.asarray(right)
    for s, n in enumerate(counts):
        close(out[s, :n], right[s, :n], tolerance)
    assert not np.isnan(out.astype(np.float32)).any()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("dtype", DTYPES)
@drawn
@given(seed=st.integers(0, 2**20), cuts=st.lists(st.integers(1, 20), max_size=5))
def test_prefill_of_packed_documents_equals_the_reference(dtype, seed, cuts):
    """Documents of any lengths, also of one row; those of the second sequence begin one row later."""
    dtype, tolerance = DTYPES[dtype]
    arguments, count = given_arrays(seed, 21, 4, dtype), jnp.asarray([21, 21])
    at = np.arange(21)
    documents = jnp.asarray(np.stack([(at[:, None] >= np.array([99, *cuts]) + late).sum(1) for late in (0, 1)]))
    given = (*arguments, count, documents)
    close(prefill(*given), right_prefill(*given), tolerance)


def late_window(rows: int, taps: int) -> list:
    return [at - 1 for at in chain_sources(rows, taps)]


def one_row_more(parents):
    return ancestors(parents).at[:, -1, -2].set(True)


def all_pending(state, fold, k, u, weight):
    return fold * state + tpu_rows.dot(k * weight, u, (0, 0))


def state_not_folded(state, fold, k, u, weight):
    return folded(state, jnp.ones_like(fold), k, u, weight)


chain_sources, ancestors, folded = tpu_rows.chain_sources, tpu.ancestors, tpu_rows.folded


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (None, "", None),
        (tpu_rows, "chain_sources", late_window),
        (tpu, "ancestors", one_row_more),
        (tpu_rows, "folded", all_pending),
        (tpu_rows, "folded", state_not_folded),
    ],
)
def test_a_broken_kernel_is_noticed(monkeypatch, module, name, broken):
    """A window off by one, a mask that leaks one row, pending rows that do not exist, a decay that is not applied."""
    if broken:
        monkeypatch.setattr(module, name, broken)
    arguments, end = given_arrays(5, 4, 4, jnp.float32), ()
    if name == "ancestors":
        end = (jnp.asarray([[-1, 0, 0, 0]] * 2),)
    run = jax.jit(lambda *x: tpu.gated_delta_block(*x, tiles=TILES, interpret=INTERPRET))
    got, want = run(*arguments, *end), right_block(*arguments, *end)
    if broken:
        with pytest.raises(AssertionError):
            close(got, want, 2e-5)
    else:
        close(got, want, 2e-5)


@pytest.mark.timeout(200)
def test_a_prefill_that_does_not_load_its_state_is_noticed(monkeypatch):
    """What the first chunk must bring into the chip's memory is poison before."""
    when, calls = tpu_prefill.pl.when, []

    def forgetful(condition):
        calls.append(condition)
        return when(condition) if len(calls) > 1 else lambda body: None

    monkeypatch.setattr(tpu_prefill.pl, "when", forgetful)
    arguments, count = given_arrays(5, 20, 4, jnp.float32), jnp.asarray([20, 20])
    run = jax.jit(lambda *x: tpu_prefill.gated_delta_prefill(*x, tiles=TILES, interpret=INTERPRET))
    out, state = run(*arguments, count)
    assert bool(jnp.all(jnp.isnan(state))) and bool(jnp.any(jnp.isnan(out)))


MODEL, HEADS = "Qwen3.5-397B-A17B", cases.MODELS["Qwen3.5-397B-A17B"]


@pytest.mark.parametrize(
    "case",
    [
        cases.block_case(MODEL, HEADS, 16, 16),
        cases.block_case(MODEL, HEADS, 2, 64, tree=True),
        cases.block_case(MODEL, HEADS, 1, 1),
        cases.prefill_case(MODEL, HEADS, 2, 512),
    ],
    ids=lambda case: case.name,
)
def test_the_cost_estimate_is_what_the_block_transfers_move(case):
    (kernel,) = kernels(jax.make_jaxpr(case.call("tpu"))(*case.arguments))
    moved = block_transfers(kernel)
    assert kernel.params["cost_estimate"].bytes_accessed == case.moved
    assert moved == case.moved
    assert moved <= 1.15 * case.must_move


def test_a_round_moves_little_more_than_the_state_both_ways():
    case = cases.block_case(MODEL, HEADS, 16, 16)
    both_ways = 2 * 4 * 16 * 64 * 128 * 128
    assert case.moved <= 1.2 * both_ways


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["batch 1, W 16", "batch 1, W 16, tree", "batch 1, prefill 512"])
def test_lowers_for_accelerators_from_here(platform, name):
    (case,) = (case for case in cases.cases() if case.name == f"gated delta: {MODEL}, {name}")
    text = jax.export.export(jax.jit(case.call(None)), platforms=[platform])(*case.arguments).mlir_module()
    assert ("tpu_custom_call" in text) == (platform == "tpu")


def test_small_heads_and_unknown_implementations():
    arguments = given_arrays(0, 4, 4, jnp.float32)
    text = jax.export.export(jax.jit(gated_delta_block), platforms=["tpu"])(*arguments).mlir_module()
    assert "tpu_custom_call" not in text  # lanes would stay empty: the reference runs
    with pytest.raises(ValueError, match="does not take these shapes"):
        gated_delta_block(*arguments, implementation="tpu")
    with pytest.raises(ValueError, match="does not take these shapes"):
        gated_delta_prefill(*arguments, jnp.asarray([4, 4]), implementation="tpu")
