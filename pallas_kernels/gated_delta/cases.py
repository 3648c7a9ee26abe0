"""The recurrent layers of published models, at real sizes."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.dispatch import tuning
from pallas_kernels.gated_delta import gated_delta_block, gated_delta_prefill
from pallas_kernels.gated_delta.pending import Pending
from pallas_kernels.gated_delta.sizes import Sizes

# Key and value heads; Qwen3-Next-80B-A3B has those of Qwen3.5-35B-A3B.
MODELS = {"Qwen3.5-397B-A17B": (16, 64), "Qwen3.5-35B-A3B": (16, 32)}
HEAD, TAPS, PENDING = 128, 4, 16  # pending rows of a prefill: those of the loop's blocks
WIDE, NARROW = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def cases() -> Iterator[Case]:
    """Blocks of 1, 16 and 64 rows (chains, and trees of 16), and prefills of 512 and 2048, for batches of 1, 16, 32.

    And one row of training, of several documents.
    """
    for model, heads in MODELS.items():
        for batch in (1, 16, 32):
            for rows in (1, 16, 64):
                yield block_case(model, heads, batch, rows)
            yield block_case(model, heads, batch, 16, tree=True)
            for rows in (512, 2048):
                yield prefill_case(model, heads, batch, rows)
        yield prefill_case(model, heads, 1, 2048, packed=True)


def block_case(model: str, heads: tuple[int, int], batch: int, rows: int, tree: bool = False) -> Case:
    """One round: W rows, as many pending."""
    given = arguments(batch, rows, rows, *heads)
    sizes = sizes_of(given)
    parents = (jax.ShapeDtypeStruct((batch, rows), jnp.int32),) if tree else ()
    moved = sizes.block_bytes(tree)
    name = f"{model}, batch {batch}, W {rows}{', tree' if tree else ''}"
    chain = (np.broadcast_to(np.arange(-1, rows - 1), (batch, rows)),) if tree else ()
    return _case(name, gated_delta_block, given + parents, sizes.block_bytes(), moved, sizes.block_flops(), chain)


def prefill_case(model: str, heads: tuple[int, int], batch: int, rows: int, packed: bool = False) -> Case:
    """A chunk of a prompt; `packed`: four documents."""
    given = arguments(batch, rows, PENDING, *heads)
    sizes, tuned = sizes_of(given), tuning(__file__)["default"]["prefill"]
    moved = sizes.prefill_bytes(sizes.Hk // sizes.group(tuned["heads"]), tuned["chunk"])
    must = sizes.prefill_bytes(1, tuned["chunk"])
    flops = sizes.prefill_flops(tuned["chunk"])
    whole = [np.full(batch, rows)]
    if packed:
        whole.append(np.broadcast_to(np.arange(rows) * 4 // rows, (batch, rows)))
    counts = tuple(jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in whole)
    name = f"{model}, batch {batch}, prefill {rows}{', packed' if packed else ''}"
    return _case(name, gated_delta_prefill, given + counts, must, moved, flops, tuple(whole))


def sizes_of(given: tuple[Any, ...]) -> Sizes:
    """Of the arguments of a public function."""
    state, pending, tail, mixed, b, _, taps = given[:7]
    return Sizes.of(state, pending, tail, mixed, b, taps)


def arguments(
    batch: int, rows: int, pending: int, k_heads: int, v_heads: int, dtype: jnp.dtype = NARROW
) -> tuple[Any, ...]:
    """Shapes of state, pending, tail, mixed, b, a, taps, A_log and dt_bias."""
    shape = jax.ShapeDtypeStruct
    columns = (k_heads, 2 * HEAD + v_heads // k_heads * HEAD)
    state = shape((batch, v_heads, HEAD, HEAD), WIDE)
    kept = jax.eval_shape(lambda: Pending.empty(batch, pending, k_heads, v_heads, HEAD, HEAD, dtype))
    tail, mixed, taps = (shape(rows + columns, dtype) for rows in ((batch, TAPS - 1), (batch, rows), (TAPS,)))
    gate, weight = shape((batch, rows, v_heads), dtype), shape((v_heads,), WIDE)
    return state, kept, tail, mixed, gate, gate, taps, weight, weight


def _case(
    name: str, function: Callable[..., Any], given: tuple[Any, ...], must_move: int, moved: int, flops: int,
    whole: tuple[np.ndarray, ...],
) -> Case:  # fmt: skip
    return Case(f"gated delta: {name}", function, given, must_move, moved, flops, whole)
