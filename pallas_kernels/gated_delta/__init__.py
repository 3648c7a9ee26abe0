"""Gated DeltaNet's mixing of rows (arXiv 2412.06464): blocks whose commit is deferred, and prefill.

One call holds the causal convolution with its silu, the unit length of q and k, the gates and the delta rule.
Dimensions: B sequences, W or T rows, Hk key heads, Hv = r Hk value heads (r to a key head), Dk and Dv their sizes;
C = 2 Dk + r Dv columns a key head: q, k, and v of its r value heads. K taps of the convolution, R = K - 1 rows before
the block.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.gated_delta import gpu, reference, tpu, tpu_prefill
from pallas_kernels.gated_delta.pending import Pending, Rows, conv_tail
from pallas_kernels.gated_delta.reference import fold

__all__ = ["Pending", "Rows", "conv_tail", "fold", "gated_delta_block", "gated_delta_prefill"]


def gated_delta_block(
    state: Float[Array, "B Hv Dk Dv"],
    pending: Pending,
    tail: Float[Array, "B R Hk C"],
    mixed: Float[Array, "B W Hk C"],
    b: Float[Array, "B W Hv"],
    a: Float[Array, "B W Hv"],
    taps: Float[Array, "K Hk C"],
    A_log: Float[Array, "Hv"],
    dt_bias: Float[Array, "Hv"],
    parents: Int[Array, "B W"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B W Hv Dv"], Float[Array, "B Hv Dk Dv"], Rows]:
    """Outputs of W rows, none of which is committed; the state with `pending` folded in; and the rows to commit from.

    Args:
        state: fp32, as the last call left it; updated in place where the caller gives it away.
        pending: the rows accepted of the last block (`Rows.commit`), of any number of rows.
        tail: the last K - 1 committed inputs of the convolution (`conv_tail`), in the dtype of `mixed`.
        mixed: the rows before the convolution, in fp32 or bf16; the outputs have this dtype.
        b, a: what the gates are made of: beta = sigmoid(b), log-decay -exp(A_log) softplus(a + dt_bias).
        taps: the convolution's, oldest first.
        parents: of a tree, in topological order: -1 for row 0, and parents[b, i] < i. A chain if None.
        implementation: "reference", "tpu" or "gpu"; by default what the program is lowered for.

    Raises:
        ValueError: the implementation asked for does not take these shapes.
    """
    arguments: tuple[Any, ...] = (state, pending, tail, mixed, b, a, taps, A_log, dt_bias, parents)
    fits = _fits_tpu(state, mixed) and mixed.shape[1] <= tpu.MOST_ROWS
    return dispatch(
        implementation,
        *arguments,
        reference=reference.gated_delta_block,
        tpu=tpu.gated_delta_block if fits else None,
        gpu=gpu.gated_delta_block if parents is None and _fits_gpu(state, mixed) else None,
    )


def gated_delta_prefill(
    state: Float[Array, "B Hv Dk Dv"],
    pending: Pending,
    tail: Float[Array, "B R Hk C"],
    mixed: Float[Array, "B T Hk C"],
    b: Float[Array, "B T Hv"],
    a: Float[Array, "B T Hv"],
    taps: Float[Array, "K Hk C"],
    A_log: Float[Array, "Hv"],
    dt_bias: Float[Array, "Hv"],
    count: Int[Array, "B"],
    documents: Int[Array, "B T"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T Hv Dv"], Float[Array, "B Hv Dk Dv"]]:
    """Outputs of T rows and the state after `pending` and the first `count[b]` of them; other outputs mean nothing.

    Arguments as for `gated_delta_block`. Rows past the count may hold anything. `documents` numbers the documents that
    lie in a row one after the other: state and convolution begin anew with each, but for the first, which goes on from
    what is given.
    """
    arguments: tuple[Any, ...] = (state, pending, tail, mixed, b, a, taps, A_log, dt_bias, count, documents)
    return dispatch(
        implementation,
        *arguments,
        reference=reference.gated_delta_prefill,
        tpu=tpu_prefill.gated_delta_prefill if _fits_tpu(state, mixed) else None,
        gpu=gpu.gated_delta_prefill if _fits_gpu(state, mixed) else None,
    )


def _fits_tpu(state: Array, mixed: Array) -> bool:
    """Head sizes fill whole lanes, as those of all published models do."""
    return not (state.shape[2] % 128 or state.shape[3] % 128) and mixed.dtype in (jnp.float32, jnp.bfloat16)


def _fits_gpu(state: Array, mixed: Array) -> bool:
    """A thread for each element of a head."""
    return state.shape[2:] == (gpu.HEAD, gpu.HEAD) and mixed.dtype in (jnp.float32, jnp.bfloat16)
