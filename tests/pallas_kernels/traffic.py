"""What a Pallas TPU kernel moves, counted from its grid and index maps, as its pipeline fetches and writes blocks."""

import itertools
from collections.abc import Iterator
from math import prod
from typing import Any

import jax
import numpy as np


def kernels(jaxpr: Any) -> Iterator[Any]:
    """The `pallas_call` equations inside a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from kernels(inner)


def block_transfers(kernel: Any) -> int:
    """Bytes: a block comes or goes when its index changes from one grid step to the next; scalars come once."""
    mapping = kernel.params["grid_mapping"]
    steps = list(itertools.product(*map(range, mapping.grid)))
    scalars = kernel.invars[: mapping.num_index_operands]
    total = sum(x.aval.size * x.aval.dtype.itemsize for x in scalars)
    for block in mapping.block_mappings:
        shape = [getattr(size, "block_size", size) for size in block.block_shape]
        size = prod(x if isinstance(x, int) else 1 for x in shape)
        closed = block.index_map_jaxpr
        dummies = [np.zeros(x.aval.shape, np.int32) for x in scalars]

        def index(step: tuple[int, ...], closed: Any = closed, dummies: list = dummies) -> tuple[int, ...]:
            return tuple(int(x) for x in jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *step, *dummies))

        indices = [index(step) for step in steps]
        changes = 1 + sum(one != two for one, two in itertools.pairwise(indices))
        total += changes * size * block.array_aval.dtype.itemsize
    return total
