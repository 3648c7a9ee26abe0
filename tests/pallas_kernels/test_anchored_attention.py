import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.anchored_attention import anchored_attention

B, A, W, N, K, H, T = 2, 3, 4, 4, 2, 8, 16
ANCHORS = np.array([[0, 5, 12], [1, 2, 15]])
STARTS = {"one document": np.zeros((B, A), int), "packed": np.array([[0, 3, 9], [0, 2, 15]])}


def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(B, A, W, N, H), (B, T, K, H), (B, T, K, H), (B, A, W, K, H), (B, A, W, K, H)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def brute_force(q, ctx_k, ctx_v, blk_k, blk_v, starts: np.ndarray, causal: bool, window: int | None) -> np.ndarray:
    out = np.zeros_like(q)
    for b, a, w, n in np.ndindex(B, A, W, N):
        anchor, head = ANCHORS[b, a], n // (N // K)
        keys, values = [], []
        for t in range(starts[b, a], anchor):
            if window is None or anchor + w - t < window:
                keys.append(ctx_k[b, t, head])
                values.append(ctx_v[b, t, head])
        for v in range(W):
            if (v <= w or not causal) and (window is None or w - v < window):
                keys.append(blk_k[b, a, v, head])
                values.append(blk_v[b, a, v, head])
        scores = np.array(keys) @ q[b, a, w, n] * 0.3
        weights = np.exp(scores - scores.max())
        out[b, a, w, n] = weights / weights.sum() @ np.array(values)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("documents", STARTS)
def test_equals_attention_row_by_row(causal, window, documents):
    given, starts = arrays(), STARTS[documents]
    out = anchored_attention(
        *map(jnp.asarray, given), jnp.asarray(ANCHORS), causal=causal, window=window, scale=0.3,
        starts=None if documents == "one document" else jnp.asarray(starts),
    )  # fmt: skip
    np.testing.assert_allclose(out, brute_force(*given, starts, causal, window), rtol=2e-4, atol=2e-6)


def test_gradients_are_finite_for_a_block_without_context():
    given = [jnp.asarray(x) for x in arrays()]
    anchors = jnp.zeros((B, A), jnp.int32)
    total = lambda *x: jnp.sum(anchored_attention(*x, anchors, causal=True, window=2, scale=0.3) ** 2)  # noqa: E731
    gradients = jax.grad(total, tuple(range(5)))(*given)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    assert not gradients[1].any() and not gradients[2].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctx_v": (B, T + 1, K, H)}, "ctx_v is"),
        ({"blk_k": (B, A, W + 1, K, H)}, "blk_k is"),
        ({"anchors": (B, A + 1)}, "anchors are"),
        ({"starts": (B, A + 1)}, "starts are"),
        ({"window": 0}, "window is 0"),
        ({"implementation": "tpu"}, "does not take these shapes"),
        ({"implementation": "gpu"}, "does not take these shapes"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    shapes = dict(zip(("q", "ctx_k", "ctx_v", "blk_k", "blk_v"), (x.shape for x in arrays()), strict=True))
    options = {name: change[name] for name in ("window", "implementation") if name in change}
    given = {name: jnp.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    anchors = jnp.zeros(change.get("anchors", (B, A)), jnp.int32)
    starts = jnp.zeros(change.get("starts", (B, A)), jnp.int32)
    with pytest.raises(ValueError, match=message):
        anchored_attention(*given.values(), anchors, causal=True, scale=0.3, starts=starts, **options)
