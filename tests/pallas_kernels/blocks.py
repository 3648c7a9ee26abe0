"""Attention blocks with everything that is not committed made of NaN, and what must come out of them, in float64."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention import block_attention


@dataclass(frozen=True)
class Block:
    """Sizes and options of one call; `lengths` has a sequence each. Arrays follow from the seed."""

    lengths: tuple[int, ...]
    width: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    page: int = 16
    pages: int = 4  # of a sequence; a dense cache has the same room
    paged: bool = True
    dtype: Any = "float32"
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    tree: bool = False
    write: bool = True
    packed: int = 1
    shared_mask: bool = False
    seed: int = 0
    scale: float = 0.3
    made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        B, W, S = len(self.lengths), self.width, self.page * self.pages
        round_to = lambda x: np.asarray(jnp.asarray(x, self.dtype), np.float64)  # noqa: E731
        draw = lambda *shape: round_to(rng.normal(size=shape))  # noqa: E731
        table = rng.permutation(B * self.pages + 3)[: B * self.pages].reshape(B, self.pages)
        for b, length in enumerate(self.lengths):
            table[b, -(-(length + W) // self.page) :] = -1  # pages that the sequence has no use for yet
        parents = np.maximum([rng.integers(0, max(i, 1)) for i in range(W)], 0)
        depths, mask = np.zeros(W, int), np.eye(W, dtype=bool)
        for i in range(1, W):
            depths[i], mask[i] = depths[parents[i]] + 1, mask[i] | mask[parents[i]]
        masks = np.broadcast_to(mask, (1 if self.shared_mask else B, W, W)).copy()
        masks[-1] |= np.tril(rng.random((W, W)) < 0.2)  # arbitrary, not only ancestors
        self.made.update(
            q=draw(B, W, self.heads, self.head_dim),
            rows=[draw(B, W, self.kv_heads, self.head_dim) for _ in range(2)],
            context=[[draw(n, self.kv_heads, self.head_dim) for n in self.lengths] for _ in range(2)],
            table=table, sinks=rng.normal(size=self.heads).astype(np.float32).astype(np.float64),
            mask=masks, depths=np.broadcast_to(depths, (len(masks), W)), capacity=S,
        )  # fmt: skip

    def at(self, b: int, s: int) -> tuple[int, int]:
        """The entry and row of the cache where position s of sequence b lies."""
        return (int(self.made["table"][b, s // self.page]), s % self.page) if self.paged else (b, s)

    def caches(self, unused: float) -> list[np.ndarray]:
        """Keys and values [P, K, S, H], `unused` wherever nothing is committed."""
        shape = (len(self.lengths), self.kv_heads, self.made["capacity"], self.head_dim)
        if self.paged:
            shape = (self.made["table"].size + 3, self.kv_heads, self.page, self.head_dim)
        caches = [np.full(shape, unused) for _ in range(2)]
        for cache, context in zip(caches, self.made["context"], strict=True):
            for b, length in enumerate(self.lengths):
                for s in range(length):
                    entry, row = self.at(b, s)
                    cache[entry, :, row] = context[b][s]
        return caches

    def stored(self, cache: np.ndarray) -> np.ndarray:
        """A cache [P, K, S, H] with heads side by side."""
        P, K, S, H = cache.shape
        parts = cache.reshape(P, K // self.packed, self.packed, S, H).swapaxes(2, 3)
        return parts.reshape(P, K // self.packed, S, self.packed * H)

    def unpacked(self, cache: np.ndarray) -> np.ndarray:
        P, _, S, _ = cache.shape
        parts = cache.reshape(P, self.kv_heads // self.packed, S, self.packed, self.head_dim).swapaxes(2, 3)
        return parts.reshape(P, self.kv_heads, S, self.head_dim)

    def arguments(self, unused: float = np.nan) -> tuple[list[jax.Array], dict[str, Any]]:
        as_dtype = lambda x: jnp.asarray(x, self.dtype)  # noqa: E731
        m = self.made
        arrays = [m["q"], *(self.stored(cache) for cache in self.caches(unused)), *m["rows"]]
        options: dict[str, Any] = {
            "causal": self.causal, "scale": self.scale, "window": self.window, "soft_cap": self.soft_cap,
            "write": self.write, "sinks": jnp.asarray(m["sinks"], jnp.float32) if self.sinks else None,
            "page_table": jnp.asarray(m["table"], jnp.int32) if self.paged else None,
        }  # fmt: skip
        if self.tree:
            options |= {"mask": jnp.asarray(m["mask"]), "depths": jnp.asarray(m["depths"], jnp.int32)}
        return [*map(as_dtype, arrays), jnp.asarray(self.lengths, jnp.int32)], options

    def run(self, unused: float = np.nan, **more: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        arrays, options = self.arguments(unused)
        return block_attention(*arrays, **options, **more)

    def sees(self, b: int, i: int) -> np.ndarray:
        """Which of the committed rows and the block's rows row i sees, one by one."""
        m, length, W = self.made, self.lengths[b], self.width
        g = b if len(m["mask"]) > 1 else 0
        depth = m["depths"][g] if self.tree else np.arange(W)
        positions = [*range(length), *(length + depth)]
        seen = []
        for s, position in enumerate(positions):
            own = s - length
            allowed = own < 0 or (m["mask"][g, i, own] if self.tree else own <= i or not self.causal)
            near = self.window is None or position > length + depth[i] - self.window
            seen.append(bool(allowed and near))
        return np.array(seen)

    def truth(self) -> np.ndarray:
        """The output in float64, row by row."""
        m, out = self.made, np.zeros_like(self.made["q"])
        for b, i, n in np.ndindex(out.shape[:3]):
            head, seen = n // (self.heads // self.kv_heads), self.sees(b, i)
            k, v = (
                np.concatenate([context[b][:, head], rows[b, :, head]])[seen]
                for context, rows in zip(m["context"], m["rows"], strict=True)
            )
            scores = self.scale * k @ m["q"][b, i, n]
            if self.soft_cap is not None:
                scores = self.soft_cap * np.tanh(scores / self.soft_cap)
            weights = np.exp(scores)
            out[b, i, n] = weights @ v / (weights.sum() + (np.exp(m["sinks"][n]) if self.sinks else 0))
        return out

    def check(self, result: tuple[jax.Array, ...], expected: np.ndarray | None = None, unused: float = np.nan) -> None:
        """Output as expected (the truth); caches exact: committed rows, the block behind, other pages untouched."""
        out, *caches = (np.asarray(x, np.float64) for x in result)
        tolerance = 2e-5 if self.dtype == "float32" else 2e-2
        np.testing.assert_allclose(out, self.truth() if expected is None else expected, rtol=tolerance, atol=tolerance)
        foreign = set(range(caches[0].shape[0])) - {self.at(b, 0)[0] for b in range(len(self.lengths))}
        if self.paged:
            foreign -= set(self.made["table"].reshape(-1).tolist())
        for cache, before, context, rows in zip(
            map(self.unpacked, caches), self.caches(unused), self.made["context"], self.made["rows"], strict=True
        ):
            if not self.write:
                np.testing.assert_array_equal(cache, before)
                continue
            np.testing.assert_array_equal(cache[sorted(foreign)], before[sorted(foreign)])
            for b, length in enumerate(self.lengths):
                should = np.concatenate([context[b], rows[b]])
                places = [self.at(b, s) for s in range(length + self.width)]
                np.testing.assert_array_equal(np.stack([cache[e, :, row] for e, row in places]), should)
