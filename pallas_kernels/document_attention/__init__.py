"""Causal attention of whole rows in which several documents lie one after the other, by platform."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.anchored_attention import gpu
from pallas_kernels.block_attention.sums import averaged, by_key_head, summed
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.documents import document_starts

SCORES = 1 << 26  # numbers of scores that the reference makes at once


def document_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    documents: Int[Array, "B T"],
    sinks: Float[Array, "N"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """A row sees the rows of its own document up to itself, of them the last `window`; softmax in fp32.

    Documents are numbered in any way in which neighbours differ. `sinks` are logits that take part in the sum only.
    TPU: jax's splash attention, for heads of a multiple of 128 and rows of a multiple of 128. GPU: the drafter's
    training attention, with every row a block of its own, where there are no sinks. Else the reference.
    """
    fits = not (q.shape[1] % 128 or q.shape[3] % 128)
    blocks = sinks is None and q.dtype == jnp.bfloat16 and q.shape[3] in (64, 128, 256)
    return dispatch(
        implementation, q, k, v, documents, sinks,
        reference=_reference, tpu=_splash if fits else None, gpu=_row_by_row if blocks else None,
        scale=scale, window=window,
    )  # fmt: skip


def _reference(
    q: Array, k: Array, v: Array, documents: Array, sinks: Array | None, *, scale: float, window: int | None
) -> Array:
    """As many queries at once as give `SCORES` scores."""
    B, T, N, H = q.shape
    keys, values, t = k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.arange(T)

    def attend(rows: tuple[Array, Array, Array]) -> Array:
        q, own, at = rows
        seen = (own[:, :, None] == documents[:, None]) & (at[0][:, None] >= t)
        if window is not None:
            seen &= at[0][:, None] - t < window
        return averaged(summed(by_key_head(q, k.shape[2]), keys, values, seen, scale, None), sinks).astype(q.dtype)

    count = max(1, min(T, SCORES // (B * N * T)))
    if count == T:
        return attend((q, documents, t[None]))

    def cut(x: Array) -> Array:  # [B T ...] -> [chunks B count ...]
        x = jnp.pad(x, [(0, 0), (0, -T % count)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return x.reshape(x.shape[0], -1, count, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(jax.checkpoint(attend), (cut(q), cut(documents), cut(t[None])))
    return out.swapaxes(0, 1).reshape(B, -1, N, H)[:, :T]


def _splash(
    q: Array, k: Array, v: Array, documents: Array, sinks: Array | None, *, scale: float, window: int | None,
    interpret: bool = False,
) -> Array:  # fmt: skip
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q.shape[1:3]
    mask = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N), head_shards=1, q_seq_shards=1, interpret=interpret
    )
    heads_first = [x.swapaxes(1, 2) for x in (q * scale, k, v)]
    sinks = None if sinks is None else sinks.astype(jnp.float32)

    def of_row(row: tuple[list[Array], Array]) -> Any:
        (q, k, v), numbers = row
        return kernel(q, k, v, splash.SegmentIds(numbers, numbers), sinks)

    return jax.vmap(of_row)((heads_first, documents)).swapaxes(1, 2).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend_rows(q: Array, k: Array, v: Array, documents: Array, scale: float, window: int | None) -> Array:
    rows, keys, values = (x[:, :, None] for x in (q, k, v))
    places = jnp.broadcast_to(jnp.arange(q.shape[1]), documents.shape), document_starts(documents)
    return gpu.anchored_attention(rows, k, v, keys, values, *places, causal=True, window=window, scale=scale)[:, :, 0]


def _rows_forward(*arguments: Any) -> tuple[Array, tuple[Array, ...]]:
    return _attend_rows(*arguments), arguments[:4]


def _rows_backward(scale: float, window: int | None, saved: tuple[Array, ...], do: Array) -> tuple[Any, ...]:
    *floats, documents = saved
    reference = functools.partial(_reference, documents=documents, sinks=None, scale=scale, window=window)
    return *jax.vjp(reference, *floats)[1](do), None


_attend_rows.defvjp(_rows_forward, _rows_backward)


def _row_by_row(
    q: Array, k: Array, v: Array, documents: Array, sinks: None, *, scale: float, window: int | None
) -> Array:
    """Gradients are the reference's."""
    return _attend_rows(q, k, v, documents, scale, window)
