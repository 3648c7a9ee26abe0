"""The GPU kernel of the drafter's training attention, on a GPU or in Mosaic GPU's interpreter, against a float64 truth.

The interpreter runs its three warpgroups, copies and barriers; for the matrix instruction plain products stand in.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.anchored_attention import gpu
from tests.pallas_kernels.anchored import SCALE, Problem, assert_close, truth
from tests.pallas_kernels.device import INTERPRET

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
    "wide head, short window": (Problem(1, 2, 64, 1, 1, 256, 80, True, 30, "bfloat16"), [[70, 66]], [[50, 66]]),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PROBLEMS)
def test_forward(name):
    problem, *places = PROBLEMS[name]
    arrays = problem.arrays(0)
    call = functools.partial(
        gpu.anchored_attention, causal=problem.causal, window=problem.window, scale=SCALE,
        interpret=INTERPRET,
    )  # fmt: skip
    out = call(*(jnp.asarray(x, jnp.bfloat16) for x in arrays[1:]), *map(jnp.asarray, places))
    assert_close((out,), truth(problem, arrays, *map(np.array, places)), "bfloat16")


def test_shared_memory_fits_a_hopper_block():
    """Queries and the ring of keys and values: counted here, because compiling ahead of time does not."""
    for head in (64, 128, 256):
        tile = gpu.tile_context(head)
        used = 2 * (2 * gpu.ROWS * head + 2 * gpu.STAGES * tile * head)
        assert used <= 227 * 1024 - 1024, head
