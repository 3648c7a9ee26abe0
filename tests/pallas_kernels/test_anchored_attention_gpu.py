"""The GPU kernel of the drafter's training attention, on a GPU or in Mosaic GPU's interpreter, against a float64 truth.

The interpreter runs its three warpgroups, copies and barriers; for the matrix instruction plain products stand in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.anchored_attention import backward_gpu, context_gpu, forward_gpu, gpu, walk_gpu
from pallas_kernels.anchored_attention.bounds import in_tiles
from tests.pallas_kernels.anchored import SCALE, Problem, assert_close, truth
from tests.pallas_kernels.device import by_the_interpreter, running_kernels

PROBLEMS = {
    "block of 10, window, two steps": (
        Problem(1, 9, 10, 1, 1, 64, 200, True, 130, "bfloat16"),
        [[190, 0, 97, *range(10, 16)]],
        [[0] * 9],
    ),
    "two KV heads, a document each": (
        Problem(1, 2, 64, 2, 2, 64, 150, False, None, "bfloat16"),
        [[64, 200]],
        [[3, 130]],
    ),
    "two query heads of 128, blocks of one row": (
        Problem(1, 150, 1, 2, 1, 128, 140, True, 60, "bfloat16"),
        [list(range(150))],
        [[0] * 50 + [50] * 100],
    ),
}


def run(name, monkeypatch):
    """Output and the five gradients, and the truth."""
    problem, *places = PROBLEMS[name]
    arrays = problem.arrays(0)
    do, *floats = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    anchors, starts = map(jnp.asarray, places)
    call = functools.partial(
        gpu.anchored_attention, anchors=anchors, starts=starts, causal=problem.causal, window=problem.window,
        scale=SCALE,
    )  # fmt: skip
    with running_kernels(monkeypatch):
        out, pull = jax.vjp(call, *floats)
        return (out, *pull(do)), truth(problem, arrays, *map(np.array, places))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_and_gradients(name, monkeypatch):
    assert_close(*run(name, monkeypatch), "bfloat16")


ROW_TILES, OF_QUERIES = context_gpu.row_tiles, backward_gpu._of_queries
FAULTS = {
    "a tile of rows left out": (context_gpu, "row_tiles", lambda *a: ROW_TILES(*a) - jnp.array([[0], [1]])),
    "the context ends a tile early": (
        walk_gpu, "in_tiles", lambda *a: jnp.minimum(in_tiles(*a), in_tiles(*a)[3] - 1),
    ),
    "sums of other rows": (
        backward_gpu, "_of_queries", lambda *a: OF_QUERIES(*a[:-2], jnp.roll(a[-2], 1, -1), a[-1]),
    ),
}  # fmt: skip


@by_the_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_close(*run("two KV heads, a document each", monkeypatch), "bfloat16")


def test_rows_that_see_a_tile_of_keys():
    """Against every row and key: for ascending rows just the tiles needed, for any others no fewer."""
    rng = np.random.default_rng(0)
    end = rng.integers(0, 513, (3, 6 * gpu.ROWS))
    end[0] = np.sort(end[0])
    first = rng.integers(0, 1 + end)
    first[0] = 0
    begin, stop = np.asarray(context_gpu.row_tiles(jnp.asarray(first), jnp.asarray(end), 512)).reshape(2, 3, 4)
    t = np.arange(512)
    sees = ((t >= first[..., None]) & (t < end[..., None])).reshape(3, 6, gpu.ROWS, 4, 128).any((2, 4))
    for b, j in np.ndindex(3, 4):
        found = np.flatnonzero(sees[b, :, j])
        assert begin[b, j] <= found[0] and found[-1] < stop[b, j] <= 6
        if b == 0:  # whole contexts, ascending: no tile too many
            assert (begin[b, j], stop[b, j]) == (found[0], 6)
    nobody = jnp.zeros((1, 128), jnp.int32)
    assert (context_gpu.row_tiles(nobody, nobody, 128) == 0).all()


@pytest.mark.timeout(300)
def test_forward_of_a_wide_head(monkeypatch):
    problem, anchors, starts = Problem(1, 2, 64, 1, 1, 256, 80, True, 30, "bfloat16"), [[70, 66]], [[50, 66]]
    arrays = problem.arrays(0)
    call = functools.partial(gpu.anchored_attention, causal=True, window=30, scale=SCALE)
    with running_kernels(monkeypatch):
        out = call(*(jnp.asarray(x, jnp.bfloat16) for x in arrays[1:]), *map(jnp.asarray, (anchors, starts)))
    assert_close((out,), truth(problem, arrays, np.array(anchors), np.array(starts)), "bfloat16")


def test_shared_memory_fits_a_hopper_block():
    """Queries and the ring of keys and values: counted here, because compiling ahead of time does not."""
    most, ring = 227 * 1024 - 2048, 2 * walk_gpu.STAGES
    for head in (64, 128, 256):
        assert 2 * head * (2 * gpu.ROWS + ring * forward_gpu.tile_context(head)) <= most, head
    for head in (64, 128):  # backward: and the output's gradient, or keys and values and a ring of rows
        assert 2 * head * (4 * gpu.ROWS + ring * backward_gpu.TILE) <= most, head
