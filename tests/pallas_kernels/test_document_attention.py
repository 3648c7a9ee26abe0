import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.document_attention as module
from pallas_kernels.document_attention import document_attention
from tests.pallas_kernels.device import running_kernels

B, T, N, K, H = 2, 29, 4, 2, 8
DOCUMENTS = np.array([np.repeat([1, 2, 3, 0], [4, 1, 20, 4]), np.repeat([1, 2], [13, 16])])


def arrays(*shape: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    batch, rows, heads, kv_heads, head = shape
    sizes = [(batch, rows, heads, head), (batch, rows, kv_heads, head), (batch, rows, kv_heads, head), (heads,)]
    return [rng.normal(size=size).astype(np.float32) for size in sizes]


def brute_force(q, k, v, sinks, documents, window: int | None) -> np.ndarray:
    """One query at a time over the keys that it sees."""
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [s for s in range(t + 1) if documents[b, s] == documents[b, t] and (window is None or t - s < window)]
        head = n // (q.shape[2] // k.shape[2])
        scores = k[b, seen, head] @ q[b, t, n] * 0.3
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
        out[b, t, n] = weights @ v[b, seen, head] / total
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("scores", [1 << 26, 2000])
def test_equals_attention_row_by_row(window, sinks, scores, monkeypatch):
    """In one piece, and some queries at a time."""
    monkeypatch.setattr(module, "SCORES", scores)
    q, k, v, sink = arrays(B, T, N, K, H)
    sink = sink if sinks else None
    out = document_attention(*map(jnp.asarray, (q, k, v, DOCUMENTS)), sink, scale=0.3, window=window)
    np.testing.assert_allclose(out, brute_force(q, k, v, sink, DOCUMENTS, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("sinks", [False, True])
def test_splash_attention_of_jax_is_asked_for_the_same(window, sinks):
    """In the interpreter."""
    q, k, v, sink = map(jnp.asarray, arrays(1, 256, 4, 2, 128))
    documents = jnp.asarray(np.repeat([1, 2, 3], [100, 30, 126])[None])
    given = (q, k, v, documents, sink if sinks else None)
    options = {"scale": 0.1, "window": window}
    out = module._splash(*given, **options, interpret=True)
    np.testing.assert_allclose(out, module._reference(*given, **options), rtol=2e-3, atol=2e-3)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("head", "window"), [(64, 50), (256, None)])
def test_the_gpu_kernel_with_a_block_for_every_row(head, window, monkeypatch):
    """On a GPU, or in the interpreter; its gradients are the reference's."""
    *floats, _ = (jnp.asarray(x, jnp.bfloat16) for x in arrays(1, 200, 2, 1, head))
    documents = jnp.asarray(np.repeat([1, 2, 3], [70, 90, 40])[None])
    options = {"documents": documents, "sinks": None, "scale": 0.3, "window": window}
    with running_kernels(monkeypatch):
        out, pull = jax.vjp(functools.partial(module._row_by_row, **options), *floats)
    exact = brute_force(*(np.asarray(x, np.float32) for x in floats), None, np.asarray(documents), window)
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=2e-2, atol=2e-2)
    wanted = jax.vjp(functools.partial(module._reference, **options), *floats)[1](out)
    for mine, other in zip(pull(out), wanted, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "mosaic_gpu")])
def test_lowers_to_a_kernel_from_here(platform, call):
    floats = [jax.ShapeDtypeStruct((2, 256, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]
    attend = jax.jit(functools.partial(document_attention, scale=0.1, window=100))
    traced = attend.trace(*floats, jax.ShapeDtypeStruct((2, 256), jnp.int32))
    assert call in traced.lower(lowering_platforms=(platform,)).as_text()
