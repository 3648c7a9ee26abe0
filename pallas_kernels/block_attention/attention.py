"""The public function: checks, and the choice of the implementation."""

from functools import partial

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_attention import tpu
from pallas_kernels.block_attention.plan import reason_against
from pallas_kernels.block_attention.reference import attend
from pallas_kernels.dispatch import Implementation, dispatch


def block_attention(
    q: Float[Array, "B W N H"],
    keys: Float[Array, "P K S H"],
    values: Float[Array, "P K S H"],
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
) -> tuple[Float[Array, "B W N H"], Float[Array, "P K S H"], Float[Array, "P K S H"]]:
    """Softmax attention of a block's rows over `lengths[b]` committed rows and over the block itself, in fp32.

    Returns the output, and the caches: with the block's rows behind the committed ones, or as they were given where
    `write` is False. Rows past the committed length are never read, and the next block overwrites them; so to reject
    a row is not to count it.

    Cache. Dense: P = B, position s of sequence b is row s of entry b, and all W rows must have room behind the
    committed ones, even if they are not written. A dense cache of capacity 0 (training) takes no rows. Paged: S rows a
    page, position s is row s % S of page `page_table[b, s // S]`. A negative entry is no page; rows that fall there, or
    past the table, are not written, and their outputs mean nothing.

    What row i sees of the block: rows up to itself (`causal`), all rows (not causal), or the rows j with
    `mask[b, i, j]`, which replaces `causal`; it should see itself. Rows of a tree lie in the order given,
    and stand `depths[b, i]` positions behind the committed ones (0 for the anchor; default i). A window counts the row
    itself. `sinks` are logits that take part in the sum only; `soft_cap` c turns a score x into c tanh(x / c).

    ValueError for sizes that do not fit each other, or an `implementation` that does not take this call.
    """
    B, W, N, _ = q.shape
    K = keys.shape[1]
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key heads evenly")
    if page_table is None and keys.shape[0] != B:
        raise ValueError(f"a dense cache has an entry a sequence: {keys.shape[0]} entries, {B} sequences")
    if page_table is not None and not keys.shape[2]:
        raise ValueError("a page has at least one row")
    if depths is not None and mask is None:
        raise ValueError("depths are of a tree, which has a mask too")
    options = {"causal": causal, "scale": scale, "window": window, "soft_cap": soft_cap, "write": write}
    arrays = (q, keys, values, block_keys, block_values, lengths, page_table, mask, depths, sinks)
    takes = reason_against(q, keys, causal, mask, write, page_table) is None
    return dispatch(
        implementation, *arrays,
        reference=partial(attend, **options),
        tpu=partial(tpu.attend, **options) if takes else None,
    )  # fmt: skip
