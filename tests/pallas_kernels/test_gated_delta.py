import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta import Pending, gated_delta_block, gated_delta_prefill
from pallas_kernels.gated_delta.tree import ancestors, sources
from tests.pallas_kernels.gated_delta_rounds import Rounds, Shape, path_to, random_parents, rows

block, prefill = jax.jit(gated_delta_block), jax.jit(gated_delta_prefill)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("width", [1, 7, 20])
def test_rounds_of_random_paths_equal_the_rule_row_by_row(width, tree):
    run = Rounds(Shape(), width, np.random.default_rng(width), block, prefill)
    run.run_prefill(9, [9, 4])
    for _ in range(4):
        run.run_block(width, tree)
    run.run_prefill(9, [2, 0])
    run.run_block(width, not tree)


@pytest.mark.parametrize("length", [2, 37])
def test_ragged_prefills_equal_the_rule_row_by_row(length):
    run = Rounds(Shape(B=3), 5, np.random.default_rng(length), block, prefill)
    for _ in range(2):
        run.run_prefill(length, [length, 0, length // 2])
        run.run_block(5, tree=False)


def test_a_state_that_decays_at_once_stays_finite():
    run = Rounds(Shape(), 6, np.random.default_rng(0), block, prefill, fast_decay=True)
    run.run_prefill(40, [40, 17])
    for tree in (False, True, False):
        run.run_block(6, tree)
    assert not bool(jnp.any(jnp.isnan(run.state)))


def test_ancestors_and_sources_follow_the_paths():
    rng, shape = np.random.default_rng(0), Shape(B=4)
    for count in (1, 2, 9, 33):
        parents = random_parents(shape, rng, count)
        reach, found = ancestors(jnp.asarray(parents)), sources(jnp.asarray(parents), 4)
        for s in range(shape.B):
            for i in range(count):
                path = path_to(parents[s], i)
                assert np.flatnonzero(reach[s, i]).tolist() == path
                assert found[s, i].tolist() == [0, 1, 2, *(3 + row for row in path)][:-5:-1]


def test_a_chain_told_as_a_tree_is_the_same():
    width, run = 12, Rounds(Shape(), 12, np.random.default_rng(3), block, prefill)
    mixed, b, a = map(jnp.asarray, rows(run.shape, run.rng, width))
    given = [run.state, run.pending, run.tail, mixed, b, a, *map(jnp.asarray, run.weights)]
    parents, path = (jnp.tile(jnp.arange(width), (2, 1)) - less for less in (1, 0))
    (out, _, left), (same, _, also) = block(*given), block(*given, parents)
    np.testing.assert_allclose(out, same, atol=1e-6)
    count = jnp.asarray([5, 12])
    for one, two in zip(jax.tree.leaves(left.commit(count)), jax.tree.leaves(also.commit(count, path)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("lengths", [[3, 1, 20, 2, 17, 9], [16, 16, 20], [40, 12]])
def test_packed_documents_begin_from_nothing(lengths):
    """Each as if it were alone, whatever chunks it lies across; the first one goes on from what is given."""
    run = Rounds(Shape(B=1), 5, np.random.default_rng(4), block, prefill)
    run.run_prefill(9, [9])
    empty = Rounds(Shape(B=1), 5, np.random.default_rng(4), block, prefill)
    mixed, b, a = rows(run.shape, run.rng, sum(lengths))
    documents = jnp.asarray(np.repeat(np.arange(1, len(lengths) + 1), lengths)[None])
    weights = tuple(map(jnp.asarray, run.weights))
    count = jnp.asarray([sum(lengths)])
    out, state = prefill(run.state, run.pending, run.tail, mixed, b, a, *weights, count, documents)
    first = 0
    for i, length in enumerate(lengths):
        given = run if i == 0 else empty
        part = tuple(jnp.asarray(np.roll(x, -first, 1)) for x in (mixed, b, a))
        alone, last = prefill(given.state, given.pending, given.tail, *part, *weights, jnp.asarray([length]))
        np.testing.assert_allclose(out[:, first : first + length], alone[:, :length], rtol=1e-5, atol=1e-5)
        first += length
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-5)


def by_rows(state, tail, mixed, b, a, taps, A_log, dt_bias):
    """The rule, row by row: outputs [B T Hv Dv] and the last state."""
    T, K, r, d = mixed.shape[1], len(taps), state.shape[1] // mixed.shape[2], state.shape[2]
    history = jnp.concatenate([tail, mixed], 1)
    x = jax.nn.silu(sum(history[:, i : i + T] * taps[i] for i in range(K)))
    unit = lambda y: jnp.repeat(y / jnp.sqrt(jnp.sum(y * y, -1, keepdims=True) + 1e-6), r, 2)  # noqa: E731
    q, k, v = unit(x[..., :d]) * d**-0.5, unit(x[..., d : 2 * d]), x[..., 2 * d :].reshape(*b.shape, -1)
    beta, decay = jax.nn.sigmoid(b), jnp.exp(-jnp.exp(A_log) * jax.nn.softplus(a + dt_bias))

    def row(state, given):
        q, k, v, beta, decay = given
        state = decay[..., None, None] * state
        u = beta[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", state, k))
        state = state + k[..., None] * u[..., None, :]
        return state, jnp.einsum("bhkv,bhk->bhv", state, q)

    state, out = jax.lax.scan(row, state, [y.swapaxes(0, 1) for y in (q, k, v, beta, decay)])
    return out.swapaxes(0, 1), state


def test_gradients_of_a_prefill_are_those_of_the_rule_row_by_row():
    """Over several chunks, one of them not full."""
    run = Rounds(Shape(), 5, np.random.default_rng(6), block, prefill)
    run.run_prefill(9, [9, 9])
    shape = run.shape
    nothing = Pending.empty(shape.B, 1, shape.Hk, shape.Hv, shape.Dk, shape.Dv)
    given = [jnp.asarray(x) for x in (run.state, run.tail, *rows(shape, run.rng, 37), *run.weights)]
    count, weights = jnp.full(2, 37), jnp.asarray(run.rng.normal(size=(2, 37, 1, 1)), jnp.float32)

    def loss(out, state):
        return jnp.sum(jnp.sin(out * 3) * weights) + jnp.sum(jnp.cos(state * 3))

    def of_chunks(state, tail, *more):
        return loss(*gated_delta_prefill(state, nothing, tail, *more, count))

    found = jax.jit(jax.grad(of_chunks, tuple(range(8))))(*given)
    want = jax.grad(lambda *given: loss(*by_rows(*given)), tuple(range(8)))(*given)
    for got, right in zip(found, want, strict=True):
        assert np.max(np.abs(right)) > 0.01
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)


def test_a_gradient_has_no_products_of_left_sides_turned_round():
    """On a CPU, where XLA's library of products does not take them: but for one, that of k with itself."""
    run = Rounds(Shape(), 5, np.random.default_rng(7), block, prefill)
    given = [jnp.asarray(x) for x in rows(run.shape, run.rng, 37)]
    more = [*map(jnp.asarray, run.weights), jnp.full(2, 37)]

    def loss(*given):
        out, state = gated_delta_prefill(run.state, run.pending, run.tail, *given, *more)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*given).compile().as_text()
    sides = re.findall(r"lhs_batch_dims=\{([\d,]+)\}, lhs_contracting_dims=\{(\d+)\}", text)
    turned = [int(column) == batch.count(",") + 1 for batch, column in sides]  # the first axis behind the batch's
    assert len(turned) > 10 and sum(turned) <= 1
