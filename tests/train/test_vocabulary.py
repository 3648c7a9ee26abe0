"""Losses behind a frozen head, some rows of logits at a time, against plain numpy and against whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.hlo import Program
from dflash_jax.models.head import Head
from pallas_kernels.head_sampling import Projection
from train.vocabulary import token_distances, token_scores

B, A, W, D, V = 2, 3, 5, 6, 40
PROJECTIONS = [Projection("dv"), Projection("vd", 1.7), Projection("dv", 0.8, 2.5)]


def example(projection: Projection, seed: int = 0):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(D, V) if projection.layout == "dv" else (V, D)).astype(np.float32)
    hidden, taught = rng.normal(size=(2, B, A, W, D)).astype(np.float32)
    return Head(jnp.asarray(weight), projection), hidden, taught, rng.integers(0, V, (B, A, W))


def log_probabilities(head: Head, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weight = np.asarray(head.weight, np.float64)
    z = (
        hidden.astype(np.float64)
        @ (weight if head.projection.layout == "dv" else weight.T)
        * head.projection.multiplier
    )
    cap = head.projection.soft_cap
    z = z if cap is None else np.tanh(z / cap) * cap
    top = z.max(-1, keepdims=True)
    return z, z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
@pytest.mark.parametrize("chunk", [0, 1, 7, 30])
def test_scores_against_numpy(projection, chunk):
    head, hidden, _, labels = example(projection)
    z, log_p = log_probabilities(head, hidden)
    nll, values, ids = jax.jit(lambda h: token_scores(head, h, jnp.asarray(labels), chunk=chunk, top=3))(hidden)
    np.testing.assert_allclose(nll, -np.take_along_axis(log_p, labels[..., None], -1)[..., 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-z, -1)[..., :3])
    np.testing.assert_allclose(values, -np.sort(-z, -1)[..., :3], rtol=1e-5, atol=1e-5)
    _, most, best = token_scores(head, hidden, jnp.asarray(labels))
    np.testing.assert_array_equal(best[..., 0], z.argmax(-1))
    np.testing.assert_allclose(most[..., 0], z.max(-1), rtol=1e-5)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_gradients_are_those_of_whole_logits(projection):
    head, hidden, _, labels = example(projection)
    rng = np.random.default_rng(2)
    weights, mixed = rng.normal(size=(B, A, W)), rng.normal(size=(B, A, W, 3))

    def parts(h):
        nll, values, _ = token_scores(head, h, jnp.asarray(labels), chunk=4, top=3, learn_top=True)
        return jnp.sum(nll * weights) + jnp.sum(jnp.sin(values) * mixed)

    def whole(h):
        z = head(h)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(z), labels[..., None], -1)[..., 0]
        return jnp.sum(nll * weights) + jnp.sum(jnp.sin(jax.lax.top_k(z, 3)[0]) * mixed)

    (found, gradient), (wanted, expected) = (jax.jit(jax.value_and_grad(f))(hidden) for f in (parts, whole))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_distances_against_numpy_and_autodiff(projection):
    head, hidden, taught, _ = example(projection)
    target = Head(head.weight, Projection(projection.layout))
    log_q, log_p = log_probabilities(head, hidden)[1], log_probabilities(target, taught)[1]
    forward, reverse = token_distances(head, target, hidden, taught, chunk=7)
    np.testing.assert_allclose(forward, np.sum(np.exp(log_p) * (log_p - log_q), -1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reverse, np.sum(np.exp(log_q) * (log_q - log_p), -1), rtol=1e-5, atol=1e-5)
    weights = np.random.default_rng(2).normal(size=(2, B, A, W))

    def parts(h):
        found = token_distances(head, target, h, taught, chunk=7)
        return sum(jnp.sum(x * w) for x, w in zip(found, weights, strict=True))

    def whole(h):
        q, p = jax.nn.log_softmax(head(h)), jax.nn.log_softmax(target(taught))
        kls = jnp.sum(jnp.exp(p) * (p - q), -1), jnp.sum(jnp.exp(q) * (q - p), -1)
        return sum(jnp.sum(x * w) for x, w in zip(kls, weights, strict=True))

    gradient, expected = (jax.jit(jax.grad(f))(hidden) for f in (parts, whole))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def largest(function, hidden) -> int:
    """Numbers in the largest temporary of the compiled gradient."""
    text = jax.jit(jax.grad(function)).lower(hidden).compile().as_text()
    return Program(text).temporaries()[0].shape.bytes // 4


def test_no_array_of_rows_times_vocabulary():
    """Neither forward nor backward: the largest array in the compiled program is one chunk of logits."""
    rows, vocab, chunk = 512, 2048, 64
    rng = np.random.default_rng(0)
    head = Head(jnp.asarray(rng.normal(size=(8, vocab)), jnp.float32), Projection("dv"))
    hidden, labels = rng.normal(size=(4, 16, rows // 64, 8)).astype(np.float32), rng.integers(0, vocab, (4, 16, 8))

    def parts(h):
        nll, values, _ = token_scores(head, h, jnp.asarray(labels), chunk=chunk, top=4, learn_top=True)
        return nll.sum() + values.sum()

    def compared(h):
        return sum(x.sum() for x in token_distances(head, head, h, hidden, chunk=chunk))

    def whole(h):
        return jnp.take_along_axis(jax.nn.log_softmax(head(h)), labels[..., None], -1).sum()

    assert largest(whole, hidden) >= rows * vocab
    assert largest(parts, hidden) < rows * vocab // 4
    assert largest(compared, hidden) < rows * vocab // 4
