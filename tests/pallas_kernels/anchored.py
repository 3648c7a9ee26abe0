"""Inputs and a dense float64 truth for the drafter's training attention, written down independently of the kernels."""

import dataclasses

import jax.numpy as jnp
import numpy as np

NAMES = ("out", "dq", "dctx_k", "dctx_v", "dblk_k", "dblk_v")
SCALE = 0.2


@dataclasses.dataclass(frozen=True)
class Problem:
    batch: int
    anchors: int
    rows: int
    heads: int
    kv_heads: int
    head: int
    context: int
    causal: bool
    window: int | None
    dtype: str = "float32"

    def arrays(self, seed: int) -> list[np.ndarray]:
        """Output gradient, queries, context keys and values, block keys and values; representable in the dtype."""
        rng = np.random.default_rng(seed)
        q = (self.batch, self.anchors, self.rows, self.heads, self.head)
        ctx = (self.batch, self.context, self.kv_heads, self.head)
        blk = (self.batch, self.anchors, self.rows, self.kv_heads, self.head)
        drawn = [rng.normal(size=shape) for shape in (q, q, ctx, ctx, blk, blk)]
        return [np.asarray(jnp.asarray(x, self.dtype), np.float64) for x in drawn]


def truth(
    problem: Problem, arrays: list[np.ndarray], anchors: np.ndarray, starts: np.ndarray | None = None
) -> list[np.ndarray]:
    """Output and the five gradients: one query at a time, over the keys that it may see and no others."""
    do, q, ctx_k, ctx_v, blk_k, blk_v = arrays
    out, dq, dctx_k, dctx_v, dblk_k, dblk_v = (np.zeros_like(x) for x in (q, q, ctx_k, ctx_v, blk_k, blk_v))
    group = problem.heads // problem.kv_heads
    for b, a, w in np.ndindex(*q.shape[:3]):
        position = anchors[b, a] + w
        start = 0 if starts is None else starts[b, a]
        t = np.arange(start, max(start, min(anchors[b, a], problem.context)))
        v = np.arange(w + 1 if problem.causal else problem.rows)
        if problem.window is not None:
            t = t[position - t < problem.window]
            v = v[w - v < problem.window]
        for n in range(problem.heads):
            k = n // group
            keys = np.concatenate([ctx_k[b, t, k], blk_k[b, a, v, k]])
            values = np.concatenate([ctx_v[b, t, k], blk_v[b, a, v, k]])
            scores = keys @ q[b, a, w, n] * SCALE
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[b, a, w, n] = weights @ values
            dweights = values @ do[b, a, w, n]
            dscores = weights * (dweights - weights @ dweights) * SCALE
            dq[b, a, w, n] = dscores @ keys
            dkeys, dvalues = np.outer(dscores, q[b, a, w, n]), np.outer(weights, do[b, a, w, n])
            dctx_k[b, t, k] += dkeys[: len(t)]
            dctx_v[b, t, k] += dvalues[: len(t)]
            dblk_k[b, a, v, k] += dkeys[len(t) :]
            dblk_v[b, a, v, k] += dvalues[len(t) :]
    return [out, dq, dctx_k, dctx_v, dblk_k, dblk_v]


def unseen(problem: Problem, anchors: np.ndarray, starts: np.ndarray | None = None) -> np.ndarray:
    """[B T]: context positions that no row of any block sees."""
    t = np.arange(problem.context)
    hidden = t >= anchors[..., None]
    if starts is not None:
        hidden |= t < starts[..., None]
    if problem.window is not None:
        hidden |= t <= anchors[..., None] - problem.window  # row 0 sees farthest back
    return hidden.all(1)


def assert_close(got, wanted, dtype: str) -> None:
    """Errors in units of the largest number of each array: sums over many rows cancel."""
    bound = {"float32": 3e-6, "bfloat16": 2e-2}[dtype]
    for name, x, y in zip(NAMES, got, wanted, strict=False):
        x = np.asarray(x, np.float64)
        assert np.isfinite(x).all(), f"{name} is not finite"
        error, size = np.abs(x - y).max(), max(np.abs(y).max(), 1e-3)
        assert error <= bound * size, f"{name}: error {error:.2e}, largest number {size:.2e}"
