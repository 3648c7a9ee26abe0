"""The TPU kernels of the drafter's training attention, in the TPU interpreter, against a dense float64 truth."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.anchored_attention import anchored_attention, backward_tpu, forward_tpu, reference, tpu
from pallas_kernels.anchored_attention.cases import cases
from pallas_kernels.anchored_attention.plan import Tiles, make_plan
from tests.pallas_kernels.anchored import SCALE, Problem, assert_close, truth, unseen

MIB = 1 << 20
SMALL = Tiles(rows=128, context=32, resident=48 * MIB, limit=60 * MIB)
PIECES = Tiles(rows=128, context=16, resident=64 << 10, limit=60 * MIB)  # the context in several spans

PROBLEMS = {
    "two heads of 64 side by side, window": (Problem(2, 5, 16, 4, 2, 64, 75, True, 11), SMALL),
    "whole context": (Problem(1, 11, 4, 8, 1, 128, 100, False, None), SMALL),
    "spans": (Problem(1, 9, 16, 2, 1, 128, 96, True, 40), PIECES),
    "block of 10, bf16": (Problem(1, 5, 10, 8, 1, 64, 70, False, None, "bfloat16"), SMALL),
}


@functools.cache
def compiled(name: str, backward: bool = True):
    problem, tiles = PROBLEMS[name]
    return jax.jit(lambda do, *x: run(problem, tiles, do, *x, backward=backward))


def run(problem: Problem, tiles: Tiles, do, *arrays, backward: bool):
    *floats, anchors, starts = arrays
    call = lambda *x: tpu.anchored_attention(  # noqa: E731
        *x, anchors, starts, causal=problem.causal, window=problem.window, scale=SCALE, tiles=tiles,
        interpret=pltpu.InterpretParams(),
    )  # fmt: skip
    if not backward:
        return (call(*floats),)
    out, pull = jax.vjp(call, *floats)
    return out, *pull(do)


def check(name: str, anchors: np.ndarray, seed: int, run=None, backward: bool = True, starts=None) -> None:
    """With NaN in every context row that no block sees."""
    problem, _ = PROBLEMS[name]
    starts = np.zeros_like(anchors) if starts is None else starts
    arrays = problem.arrays(seed)
    given = [jnp.asarray(x, problem.dtype) for x in arrays]
    hidden = jnp.asarray(unseen(problem, anchors, starts))[..., None, None]
    given[2:4] = [jnp.where(hidden, jnp.nan, x) for x in given[2:4]]
    got = (run or compiled(name, backward))(*given, jnp.asarray(anchors), jnp.asarray(starts))
    assert_close(got, truth(problem, arrays, anchors, starts), problem.dtype)


def test_the_spans_are_several():
    problem, tiles = PROBLEMS["spans"]
    plan = make_plan((1, 9, 16, 2, 128), 1, problem.context, 4, tiles)
    assert plan.spans > 1
    assert plan.back_spans > plan.spans


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_and_gradients(name):
    @settings(
        max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
        phases=[Phase.generate],  # a smaller example of a failure takes the interpreter minutes to find
    )  # fmt: skip
    @given(st.data())
    def drawn(data):
        problem, _ = PROBLEMS[name]
        count = problem.batch * problem.anchors
        # Anchors in any order; none, all of the context, and beyond it.
        T = problem.context
        place = st.one_of(st.integers(0, T), st.sampled_from([0, 1, T, T + 9]))
        anchors = np.array(data.draw(st.lists(place, min_size=count, max_size=count))).reshape(problem.batch, -1)
        anchors = np.sort(anchors) if data.draw(st.booleans()) else anchors
        # Documents of random lengths; an anchor may be the first row of its own, and then sees nothing.
        cuts = np.sort([0, *data.draw(st.lists(st.integers(0, T), max_size=3))])
        starts = cuts[np.searchsorted(cuts, anchors, "right") - 1]
        check(name, anchors, data.draw(st.integers(0, 9)), starts=starts)

    drawn()


@pytest.mark.timeout(300)
def test_blocks_without_any_context():
    problem, _ = PROBLEMS["whole context"]
    check("whole context", np.zeros((1, problem.anchors), int), 0)


@pytest.mark.parametrize("name", ["two heads of 64 side by side, window", "whole context"])
def test_reference_equals_truth(name):
    """And its autodiff."""
    problem, _ = PROBLEMS[name]
    arrays = problem.arrays(3)
    anchors = np.random.default_rng(1).integers(0, problem.context + 2, (problem.batch, problem.anchors))
    starts = np.where(anchors > 30, 30, anchors // 2)
    do, *floats = (jnp.asarray(x, jnp.float32) for x in arrays)
    options = {"causal": problem.causal, "window": problem.window, "scale": SCALE}

    @jax.jit
    def whole(do, *floats):
        call = functools.partial(
            reference.anchored_attention, anchors=jnp.asarray(anchors), starts=jnp.asarray(starts), **options
        )
        out, pull = jax.vjp(call, *floats)
        return out, *pull(do)

    assert_close(whole(do, *floats), truth(problem, arrays, anchors, starts), "float32")


class Forgetful:
    """A copy that nobody waits for."""

    def __init__(self, *arguments):
        self.start, self.wait = MAKE_COPY(*arguments).start, lambda: None


MAKE_COPY, EACH_TILE, REACH = pltpu.make_async_copy, forward_tpu.Step.each_tile, forward_tpu.reach
FAULTS = {
    # name: (owner, attribute, the broken one, problem, whether the backward is needed to see it)
    "missing wait": (pltpu, "make_async_copy", Forgetful, "whole context", True),
    "skipped tile": (
        forward_tpu.Step, "each_tile",
        lambda self, *a: EACH_TILE(self._replace(tiles=(*self.tiles[:3], self.tiles[3] - 1)), *a),
        "whole context", False,
    ),
    "anchor visible": (
        forward_tpu, "reach", lambda *a: (REACH(*a)[0] + 1, REACH(*a)[1]), "whole context", False,
    ),
    "window one wider": (
        forward_tpu, "reach", lambda a, s, plan, window: REACH(a, s, plan, window and window + 1),
        "two heads of 64 side by side, window", False,
    ),
}  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    owner, attribute, broken, name, backward = FAULTS[fault]
    problem, tiles = PROBLEMS[name]
    anchors = np.random.default_rng(2).integers(20, problem.context - 8, (problem.batch, problem.anchors))
    monkeypatch.setattr(owner, attribute, broken)
    for kernel in (forward_tpu.forward, backward_tpu.backward):
        kernel.clear_cache()
    try:
        with pytest.raises(AssertionError):
            check(name, anchors, 0, jax.jit(functools.partial(run, problem, tiles, backward=backward)))
    finally:
        pltpu.reset_tpu_interpret_mode_state()
        for kernel in (forward_tpu.forward, backward_tpu.backward):
            kernel.clear_cache()


def blocks_moved(monkeypatch, plan, kernel, arrays) -> int:
    """Bytes of a kernel's block transfers: its index maps walked over its grid, a block counted when it changes."""
    seen = []

    def record(body, *, grid_spec, out_shape, **_):
        seen.extend([grid_spec, out_shape])
        return lambda *inputs: seen.append(inputs) or [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setattr(pl, "pallas_call", record)
    with jax.disable_jit():
        kernel.__wrapped__(forward_tpu.Options(plan, False, None, 1.0), *arrays)
    monkeypatch.undo()
    grid, outputs, inputs = seen
    scalars, arrays = inputs[: grid.num_scalar_prefetch], inputs[grid.num_scalar_prefetch :]
    operands = list(zip([*grid.in_specs, *grid.out_specs], [*arrays, *outputs], strict=True))
    total = sum(x.size * x.dtype.itemsize for x in scalars)
    for spec, operand in operands:
        if spec.block_shape is None:  # copied by hand: all of it once, or the checks above would find NaN
            total += math.prod(operand.shape) * operand.dtype.itemsize
            continue
        size = math.prod(n for n in spec.block_shape if n is not None) * operand.dtype.itemsize
        before = None
        for place in np.ndindex(*grid.grid):
            at = tuple(int(i) for i in spec.index_map(*place, *map(np.asarray, scalars)))
            total += size * (at != before)
            before = at
    return total


@pytest.mark.parametrize("tiles", [SMALL, PIECES])
def test_cost_estimates_are_what_the_kernels_move(tiles, monkeypatch):
    """In the worst case, in which every anchor stands at the end."""
    plan = make_plan((2, 16, 16, 4, 128), 2, 96, 4, tiles)
    rows, own = (2, 16 * 16, 4 * 128), (2, 16 * 16, 2 * 128)
    shapes = [rows, (2, 96, 2 * 128), (2, 96, 2 * 128), own, own]
    arrays = [jnp.zeros(shape) for shape in shapes]
    lse = jnp.zeros((2, plan.groups, 1, plan.steps * plan.folded))
    places = [jnp.full((2, 16), 96, jnp.int32), jnp.zeros((2, 16), jnp.int32)]
    forward = blocks_moved(monkeypatch, plan, forward_tpu.forward, [*arrays, *places])
    assert forward == plan.forward_bytes()
    saved = [*arrays, *places, jnp.zeros(rows), lse, jnp.zeros(rows)]
    assert blocks_moved(monkeypatch, plan, backward_tpu.backward, saved) == plan.backward_bytes()


def test_real_sizes_move_little_more_than_they_must():
    for case in cases():
        assert case.must_move <= case.moved <= 1.15 * case.must_move, case.name


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for(platform):
    """Forward and backward, at a real head size, from a machine that has no accelerator."""
    shapes = [(2, 32, 16, 8, 128), (2, 256, 2, 128), (2, 256, 2, 128), (2, 32, 16, 2, 128), (2, 32, 16, 2, 128)]
    floats = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def loss(*arrays):
        out = anchored_attention(*arrays, causal=True, window=100, scale=0.1)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    step = jax.jit(jax.grad(loss, tuple(range(5))))
    program = jax.export.export(step, platforms=[platform])(*floats, jax.ShapeDtypeStruct((2, 32), jnp.int32))
    text = program.mlir_module()
    assert ("tpu_custom_call" if platform == "tpu" else "mosaic_gpu") in text
