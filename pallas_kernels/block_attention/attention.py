"""The public function: checks, and the choice of the implementation."""

from typing import Any

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_attention import gpu, tpu
from pallas_kernels.block_attention.plan import reason_against
from pallas_kernels.block_attention.reference import attend
from pallas_kernels.dispatch import Implementation, dispatch


def block_attention(
    q: Float[Array, "B W N H"],
    keys: Float[Array, "P Kp S Hp"],
    values: Float[Array, "P Kp S Hp"],
    block_keys: Float[Array, "B W K H"],
    block_values: Float[Array, "B W K H"],
    lengths: Int[Array, "B"],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    soft_cap: float | None = None,
    mask: Bool[Array, "#B W W"] | None = None,
    depths: Int[Array, "#B W"] | None = None,
    page_table: Int[Array, "B n"] | None = None,
    write: bool = True,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B W N H"], Float[Array, "P Kp S Hp"], Float[Array, "P Kp S Hp"]]:
    """Softmax attention of a block's rows over `lengths[b]` committed rows and over the block itself, in fp32.

    Returns the output, and the caches: with the block's rows behind the committed ones, or as they were given where
    `write` is False. Rows past the committed length are never read, and the next block overwrites them; so to reject
    a row is not to count it.

    Cache. Dense: P = B, position s of sequence b is row s of entry b, and all W rows must have room behind the
    committed ones, even if they are not written. A dense cache of capacity 0 (training) takes no rows. Paged: S rows a
    page, position s is row s % S of page `page_table[b, s // S]`. A negative entry is no page; rows that fall there, or
    past the table, are not written, and their outputs mean nothing.

    Heads side by side: a cache [P, K / p, S, p * H] holds p key heads in one. It is for heads of 64 on TPU, whose
    memory has rows of 128 numbers: p = 2 halves what the cache takes and what is read.

    What row i sees of the block: rows up to itself (`causal`), all rows (not causal), or the rows j with
    `mask[b, i, j]`, which replaces `causal`; it should see itself. Rows of a tree lie in the order given,
    and stand `depths[b, i]` positions behind the committed ones (0 for the anchor; default i). A window counts the row
    itself. `sinks` are logits that take part in the sum only; `soft_cap` c turns a score x into c tanh(x / c).

    ValueError for sizes that do not fit each other, or an `implementation` that does not take this call.
    """
    _check(q, keys, values, block_keys, page_table, mask, depths)
    arrays = (q, keys, values, block_keys, block_values, lengths, page_table, mask, depths, sinks)
    takes = reason_against(q, keys, causal, mask, write, page_table) is None
    return dispatch(
        implementation, *arrays,
        reference=attend,
        tpu=tpu.attend if takes else None,
        gpu=gpu.attend if gpu.reason_against(q, keys, causal, mask, write) is None else None,
        causal=causal, scale=scale, window=window, soft_cap=soft_cap, write=write,
    )  # fmt: skip


def _check(
    q: Array, keys: Array, values: Array, block_keys: Array, table: Array | None, mask: Array | None, depths: Any
) -> None:
    """ValueError for sizes that do not fit each other."""
    (B, _, N, H), K, cache = q.shape, block_keys.shape[2], keys.shape
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key heads evenly")
    if cache != values.shape or cache[3] % H or cache[1] * cache[3] != K * H:
        raise ValueError(f"keys {cache} and values {values.shape} do not hold {K} heads of {H}")
    if table is None and cache[0] != B:
        raise ValueError(f"a dense cache has an entry a sequence: {cache[0]} entries, {B} sequences")
    if table is not None and not cache[2]:
        raise ValueError("a page has at least one row")
    if depths is not None and mask is None:
        raise ValueError("depths are of a tree, which has a mask too")
