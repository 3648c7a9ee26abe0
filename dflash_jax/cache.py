"""What is remembered of committed tokens: pytrees with append, commit and nothing to roll back.

Rows past the committed length do not exist: they are never read, and rejecting a row is not counting it. Recurrent
layers keep the accepted rows of the last block as pending, and fold them into the state in the next forward.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dflash_jax.config import DrafterConfig, GatedDeltaConfig, TargetConfig
from dflash_jax.sharding import constrain, kv_copies, shards, with_copies
from pallas_kernels.block_attention import write_rows
from pallas_kernels.gated_delta import Pending, Rows, conv_tail, fold


def side_by_side(heads: int, head_dim: int, dtype: jnp.dtype) -> int:
    """How many of the cached heads lie together as one: see `KeyValues`. A pair is never of two shards."""
    pairs = head_dim == 64 and jnp.dtype(dtype).itemsize == 2 and heads // shards("kv_heads") % 2 == 0
    return 2 if pairs else 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Keys and values of one attention layer, head by head so that one head's positions are contiguous.

    K counts copies: see `dflash_jax.sharding.kv_copies`. Two heads of 64 numbers of 16 bits, what accelerators run, lie
    side by side as one of 128, a row of a TPU's memory: [B, K / 2, S, 128].
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]

    @classmethod
    def empty(cls, batch: int, heads: int, capacity: int, head_dim: int, dtype: jnp.dtype) -> "KeyValues":
        heads *= kv_copies(heads)
        packed = side_by_side(heads, head_dim, dtype)
        zeros = jnp.zeros((batch, heads // packed, capacity, packed * head_dim), dtype)
        return cls(zeros, zeros).laid_out()

    def laid_out(self) -> "KeyValues":
        """The same where the context's mesh wants it."""
        return jax.tree.map(lambda x: constrain(x, "batch", "kv_heads", None, None), self)

    def placed(self, rows: Float[Array, "B T K H"]) -> Float[Array, "B K T H"]:
        """Keys or values of T positions as this cache holds them."""
        rows = with_copies(rows)
        return rows.reshape(*rows.shape[:2], -1, self.keys.shape[3]).swapaxes(1, 2)

    def commit(self, rows: "KeyValues", lengths: Int[Array, "B"], count: Int[Array, "B"]) -> "KeyValues":
        """`rows` is this cache with the block's rows behind the committed ones: they need only be counted."""
        return rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeferredRows:
    """A block of rows of a recurrent layer, of which a path (a prefix of a chain) will be committed."""

    state: Float[Array, "B Hv Dk Dv"]  # with the last block's pending rows folded in
    rows: Rows
    tail: Float[Array, "B 3 Hk C"]  # the convolution's inputs before the block
    mixed: Float[Array, "B W Hk C"]  # the block's rows, before the convolution


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recurrence:
    """State of one gated delta layer: the matrix, the convolution's last inputs, and rows accepted but not folded."""

    state: Float[Array, "B Hv Dk Dv"]
    conv: Float[Array, "B 3 Hk C"]
    pending: Pending

    @classmethod
    def empty(cls, c: GatedDeltaConfig, batch: int, rows: int, dtype: jnp.dtype) -> "Recurrence":
        channels = 2 * c.k_head_dim + c.num_v_heads // c.num_k_heads * c.v_head_dim
        conv = jnp.zeros((batch, c.conv_kernel - 1, c.num_k_heads, channels), dtype)
        pending = Pending.empty(batch, rows, c.num_k_heads, c.num_v_heads, c.k_head_dim, c.v_head_dim, dtype)
        return cls(jnp.zeros((batch, c.num_v_heads, c.k_head_dim, c.v_head_dim)), conv, pending).laid_out()

    def laid_out(self) -> "Recurrence":
        """The same where the context's mesh wants it."""
        return Recurrence(
            state=constrain(self.state, "batch", "key_heads", "..."),
            conv=constrain(self.conv, "batch", None, "key_heads", None),
            pending=jax.tree.map(lambda x: constrain(x, "batch", "key_heads", "..."), self.pending),
        )

    def fitted(self, rows: int) -> "Recurrence":
        """The same with room for `rows` pending rows: more get weight 0; for fewer, those there are folded in."""
        p = self.pending
        spare = rows - p.weight.shape[2]
        if spare >= 0:
            k, u, weight = (jnp.pad(x, [(0, 0), (0, 0), (0, spare), (0, 0)][: x.ndim]) for x in (p.k, p.u, p.weight))
            return replace(self, pending=Pending(k, u, weight, p.fold))
        k, u, weight = (jnp.zeros_like(x[:, :, :rows]) for x in (p.k, p.u, p.weight))
        return replace(self, state=fold(self.state, p), pending=Pending(k, u, weight, jnp.ones_like(p.fold)))

    def after(self, state: Array, mixed: Array, count: Int[Array, "B"]) -> "Recurrence":
        """`state` holds the first `count[b]` rows of `mixed`, nothing is pending."""
        pending = jax.tree.map(jnp.zeros_like, self.pending)
        pending = replace(pending, fold=jnp.ones_like(pending.fold))
        return Recurrence(state=state, conv=conv_tail(self.conv, mixed, count), pending=pending)

    def commit(
        self,
        rows: DeferredRows,
        lengths: Int[Array, "B"],
        count: Int[Array, "B"],
        path: Int[Array, "B N"] | None = None,
    ) -> "Recurrence":
        """The first `count[b]` rows of the block, or of the path through its tree, become pending."""
        tail = conv_tail(rows.tail, rows.mixed, count, path)
        return Recurrence(state=rows.state, conv=tail, pending=rows.rows.commit(count, path))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TargetCache:
    """All that the target remembers of `lengths[b]` committed tokens, layer by layer."""

    lengths: Int[Array, "B"]
    layers: tuple[KeyValues | Recurrence, ...]
    page_table: Int[Array, "B n"] | None = None  # pages of each sequence, -1 for none yet; None: a dense cache

    @classmethod
    def empty(
        cls,
        config: TargetConfig,
        batch: int,
        capacity: int,
        rows: int,
        dtype: jnp.dtype,
        pages: tuple[int, int] | None = None,
    ) -> "TargetCache":
        """For `capacity` tokens a sequence, and blocks of `rows` in the rounds.

        `pages` is (how many there are, rows of one) for a paged cache, whose sequences have no page yet.
        """
        entries, room = (batch, capacity) if pages is None else pages

        def layer(kind: str) -> KeyValues | Recurrence:
            if kind == "linear_attention" and config.gated_delta is not None:
                return Recurrence.empty(config.gated_delta, batch, rows, dtype)
            return KeyValues.empty(entries, config.num_kv_heads, room, config.head_dim, dtype)

        table = None if pages is None else jnp.full((batch, -(-capacity // room)), -1, jnp.int32)
        return cls(jnp.zeros(batch, jnp.int32), tuple(layer(kind) for kind in config.layer_types), table)

    def commit(self, rows: tuple[Any, ...], count: Int[Array, "B"]) -> "TargetCache":
        """Keep the first `count[b]` rows of the block that `Target.verify` ran; the rest never was.

        `rows` are the forward's layers: the caches with the rows in them for attention, `DeferredRows` for recurrent
        layers.
        """
        layers = (layer.commit(new, self.lengths, count) for layer, new in zip(self.layers, rows, strict=True))
        return replace(self, lengths=self.lengths + count, layers=tuple(layers))

    def take(self, slots: Int[Array, "B"]) -> "TargetCache":
        """Some of the sequences as a batch of their own. Pages stay where they are."""
        layers = (x if isinstance(x, KeyValues) else _rows_of(x, slots) for x in self.layers)
        return TargetCache(self.lengths[slots], tuple(layers), _rows_of(self.page_table, slots))

    def put(self, part: "TargetCache", slots: Int[Array, "B"]) -> "TargetCache":
        """`part`, which was taken, back in its place; a slot past the last is dropped. Page tables stay as they are."""
        layers = (
            new if isinstance(new, KeyValues) else _with_rows(old, new, slots)
            for old, new in zip(self.layers, part.layers, strict=True)
        )
        return replace(self, lengths=_with_rows(self.lengths, part.lengths, slots), layers=tuple(layers))

    @property
    def rows(self) -> int:
        """Rows of the rounds that recurrent layers have room for; 0 without such layers."""
        return max((x.pending.weight.shape[2] for x in self.layers if isinstance(x, Recurrence)), default=0)

    def fitted(self, rows: int) -> "TargetCache":
        """The same for rounds of `rows` rows."""
        layers = (x.fitted(rows) if isinstance(x, Recurrence) else x for x in self.layers)
        return replace(self, layers=tuple(layers))


def _rows_of(tree: Any, slots: Array) -> Any:
    return jax.tree.map(lambda x: x[slots], tree)


def _with_rows(tree: Any, part: Any, slots: Array) -> Any:
    return jax.tree.map(lambda x, new: x.at[slots].set(new, mode="drop"), tree, part)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Backlog:
    """Taps of the last `count[b]` committed rows, which the drafter has not read yet.

    A plain round puts its row here, which costs a copy; the drafter reads all rows in one pass before it drafts again.
    """

    taps: Float[Array, "B R CD"]
    count: Int[Array, "B"]

    def add(self, taps: Float[Array, "B 1 CD"], count: Int[Array, "B"]) -> "Backlog":
        """Append one row where `count[b]` is 1. A sequence with R rows has no room: see `decoding.observe.catch_up`."""
        batch, room = self.taps.shape[:2]
        at = jnp.where(count > 0, self.count, room)
        taps = self.taps.at[jnp.arange(batch), at].set(taps[:, 0].astype(self.taps.dtype), mode="drop")
        return Backlog(taps, self.count + count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DrafterCache:
    """Keys and values that the drafter made from the target's taps, for committed positions only."""

    layers: tuple[KeyValues, ...]
    backlog: Backlog | None = None  # None: the drafter reads the rows of every round at once

    @classmethod
    def empty(
        cls,
        config: DrafterConfig,
        batch: int,
        capacity: int,
        dtype: jnp.dtype,
        backlog: tuple[int, int] | None = None,
    ) -> "DrafterCache":
        """Reserve `capacity` positions for each of `batch` sequences or pages.

        `backlog` is (sequences, rows of each) that plain rounds may leave unread.
        """
        layer = KeyValues.empty(batch, config.num_kv_heads, capacity, config.head_dim, dtype)
        layers, width = (layer,) * config.num_layers, len(config.tap_ids) * config.hidden_size
        if backlog is None:
            return cls(layers)
        taps = constrain(jnp.zeros((*backlog, width), dtype), "batch", "...")
        return cls(layers, Backlog(taps, jnp.zeros(backlog[0], jnp.int32)))

    def commit(
        self,
        rows: tuple[tuple[Array, Array], ...],
        lengths: Int[Array, "B"],
        count: Int[Array, "B"],
        page_table: Int[Array, "B n"] | None = None,
    ) -> "DrafterCache":
        """Write the first `count[b]` context rows of every layer, keys and values [B, T, K, H], at `lengths[b]`.

        With the target's `page_table` the caches hold pages, the target's own.
        """

        def of_layer(cache: KeyValues, keys: Array, values: Array) -> KeyValues:
            return KeyValues(
                write_rows(cache.keys, cache.placed(keys), lengths, count, page_table=page_table),
                write_rows(cache.values, cache.placed(values), lengths, count, page_table=page_table),
            )

        return replace(self, layers=tuple(of_layer(c, *kv) for c, kv in zip(self.layers, rows, strict=True)))

    def take(self, slots: Int[Array, "B"]) -> "DrafterCache":
        """Return some of the sequences as a batch of their own. Pages stay where they are."""
        return replace(self, backlog=_rows_of(self.backlog, slots))

    def put(self, part: "DrafterCache", slots: Int[Array, "B"]) -> "DrafterCache":
        """Put back `part`, which was taken; a slot past the last is dropped."""
        return replace(part, backlog=_with_rows(self.backlog, part.backlog, slots))
