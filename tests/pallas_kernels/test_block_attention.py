import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import block_attention

B, W, N, K, H, S = 2, 4, 4, 2, 8, 16
LENGTHS = np.array([0, 9])


def brute_force(q, keys, values, own_k, own_v, causal, window, sinks):
    out = np.zeros_like(q)
    for b, w, n in np.ndindex(B, W, N):
        k, v = (
            [*cache[b, n // 2, : LENGTHS[b]], *own[b, :, n // 2]] for cache, own in ((keys, own_k), (values, own_v))
        )
        at = LENGTHS[b] + w
        seen = [s for s in range(len(k)) if (s <= at or not causal) and (window is None or s > at - window)]
        weights = np.exp([0.3 * k[s] @ q[b, w, n] for s in seen])
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
        out[b, w, n] = weights / total @ np.array([v[s] for s in seen])
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("sink", [False, True])
def test_equals_attention_row_by_row(causal, window, sink):
    rng = np.random.default_rng(0)
    shapes = [(B, W, N, H), (B, K, S, H), (B, K, S, H), (B, W, K, H), (B, W, K, H)]
    given = [rng.normal(size=shape) for shape in shapes]
    sinks = rng.normal(size=N) if sink else None
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (given, sinks))
    out, keys, values = block_attention(
        *single[0], jnp.asarray(LENGTHS), causal=causal, window=window, scale=0.3, sinks=single[1]
    )
    np.testing.assert_allclose(out, brute_force(*given, causal, window, sinks), rtol=2e-4, atol=2e-6)
    for cache, before, rows in ((keys, given[1], given[3]), (values, given[2], given[4])):
        for b, n in enumerate(LENGTHS):
            np.testing.assert_allclose(cache[b, :, n : n + W], rows[b].swapaxes(0, 1), rtol=1e-6)
            np.testing.assert_allclose(cache[b, :, :n], before[b, :, :n], rtol=1e-6)
