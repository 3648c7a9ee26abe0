import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import losses


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def example(rows: int = 11, dim: int = 5, vocab: int = 7):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, dim)), rng.normal(size=(dim, vocab)), rng.integers(0, vocab, rows)


def test_cross_entropy_is_the_negative_log_likelihood():
    hidden, head, labels = example()
    expected = -np.log(softmax(hidden @ head)[np.arange(len(labels)), labels])
    np.testing.assert_allclose(
        losses.cross_entropy(jnp.asarray(hidden @ head), jnp.asarray(labels)), expected, rtol=1e-5
    )


@pytest.mark.parametrize("chunk", [0, 1, 4, 11, 100])
def test_logits_in_chunks_change_neither_values_nor_gradients(chunk):
    hidden, head, labels = example()

    def total(hidden: jax.Array, head: jax.Array, chunk: int):
        nll, guess = losses.chunked_head(lambda x: x @ head, hidden, jnp.asarray(labels), chunk)
        return nll.sum(), guess

    compiled = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=2)
    (value, guess), gradients = compiled(hidden, head, chunk)
    (whole, best), expected = compiled(hidden, head, 0)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    np.testing.assert_array_equal(guess, best)
    np.testing.assert_array_equal(best, (hidden @ head).argmax(-1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), gradients, expected)


def test_mean_divides_by_the_sum_of_weights():
    values, weights = np.array([1.0, 2.0, 50.0]), np.array([0.5, 0.25, 0.0])
    np.testing.assert_allclose(losses.weighted(values, weights).value, 1.0 / 0.75, rtol=1e-6)
    assert losses.weighted(values, np.zeros(3)).value == 0


def test_weights_decay_from_the_first_drafted_row():
    found = losses.decay_weights(jnp.array([0.0, 1, 1, 1, 0]), 4.0)
    np.testing.assert_allclose(found, [0, 1, np.exp(-0.25), np.exp(-0.5), 0], rtol=1e-6)


def test_dpace_weights_are_the_acceptance_length_still_ahead():
    rng = np.random.default_rng(1)
    nll = rng.exponential(size=(2, 3, 6))
    counts = np.ones_like(nll)
    counts[..., 0] = 0
    counts[0, 1, 4:] = 0
    expected = np.zeros_like(nll)
    for block in np.ndindex(2, 3):
        reached, chance = np.zeros(6), 1.0
        for row in range(1, 6):
            if counts[block][row]:
                chance *= 0.5 * np.exp(-nll[block][row]) + 0.5
                reached[row] = chance
        for row in range(1, 6):
            expected[block][row] = reached[row:].sum() * counts[block][row]
    np.testing.assert_allclose(losses.dpace_weights(jnp.asarray(nll), jnp.asarray(counts)), expected, rtol=1e-5)
    assert not np.any(jax.grad(lambda x: losses.dpace_weights(x, jnp.asarray(counts)).sum())(jnp.asarray(nll)))


def test_acceptance_stops_at_the_first_wrong_row():
    correct = jnp.array([[0.0, 1, 1, 0, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    counts = jnp.array([[0.0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(losses.accepted(correct, counts), [[0, 1, 1, 0, 0], [0] * 5, [0, 1, 1, 0, 0]])


def test_opd_weights_accepted_rows_alike_and_lets_rejected_ones_fade():
    correct = jnp.array([[1.0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1]])
    counts = jnp.array([[0.0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    kept, rejected = losses.opd_weights(correct, counts, 0.5)
    np.testing.assert_allclose(kept, [[0, 1, 1, 0, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 0]])
    expected = [[0, 0, 0, 1, 0.5, 0.25], [0, 1, 0.5, 0.25, 0.125, 0.0625], [0, 0, 1, 0.5, 0, 0]]
    np.testing.assert_allclose(rejected, expected)
