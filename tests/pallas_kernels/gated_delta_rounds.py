"""The gated delta rule row after row in float64, and rounds of blocks and prefills that are held against it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_delta import Pending, Rows, conv_tail, fold

folded, tail_after, committed = jax.jit(fold), jax.jit(conv_tail), jax.jit(Rows.commit)


@dataclass(frozen=True)
class Shape:
    Hk: int = 2
    r: int = 2
    Dk: int = 16
    Dv: int = 8
    B: int = 2
    taps: int = 4

    @property
    def C(self) -> int:
        return 2 * self.Dk + self.r * self.Dv

    @property
    def Hv(self) -> int:
        return self.Hk * self.r


def weights(shape: Shape, rng: np.random.Generator, fast_decay: bool = False) -> tuple[np.ndarray, ...]:
    """taps, A_log and dt_bias; a fast decay forgets all but the last row or two."""
    rates = rng.uniform(20.0, 60.0, shape.Hv) if fast_decay else rng.uniform(1e-3, 1.0, shape.Hv)
    taps = rng.normal(size=(shape.taps, shape.Hk, shape.C)) * 0.5
    return tuple(x.astype(np.float32) for x in (taps, np.log(rates), rng.normal(size=shape.Hv)))


def rows(shape: Shape, rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
    """mixed, b and a of so many rows a sequence."""
    sizes = [(shape.B, count, shape.Hk, shape.C), (shape.B, count, shape.Hv), (shape.B, count, shape.Hv)]
    return tuple(rng.normal(size=size).astype(np.float32) for size in sizes)


def random_parents(shape: Shape, rng: np.random.Generator, count: int, back: int = 3) -> np.ndarray:
    one = [[-1] + [int(rng.integers(max(0, i - back), i)) for i in range(1, count)] for _ in range(shape.B)]
    return np.array(one, np.int32)


def path_to(parents: np.ndarray, row: int) -> list[int]:
    found = []
    while row >= 0:
        found.append(row)
        row = int(parents[row])
    return found[::-1]


class Truth:
    """One sequence: the state and the inputs so far; a row may hang off any other."""

    def __init__(self, shape: Shape, given: tuple[np.ndarray, ...]):
        self.shape, self.taps, (self.A_log, self.dt_bias) = shape, given[0].astype(float), given[1:]
        self.start = np.zeros((shape.Hv, shape.Dk, shape.Dv)), [np.zeros((shape.Hk, shape.C))] * (shape.taps - 1)

    def step(self, at: Any, mixed: np.ndarray, b: np.ndarray, a: np.ndarray) -> tuple[Any, np.ndarray]:
        """The place after one more row, and the row's output [Hv, Dv]."""
        n, (state, before) = self.shape, at
        before = [*before, mixed.astype(float)]
        x = sum(tap * row for tap, row in zip(self.taps, before, strict=True))
        x = x / (1 + np.exp(-x))
        q, k, v = np.split(x, [n.Dk, 2 * n.Dk], -1)
        q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        v = v.reshape(n.Hv, n.Dv)
        q, k = (np.repeat(y, n.r, 0) for y in (q * n.Dk**-0.5, k))
        g = -np.exp(self.A_log.astype(float)) * np.log1p(np.exp(a.astype(float) + self.dt_bias))
        state = state * np.exp(g)[:, None, None]
        u = (v - np.einsum("hk,hkv->hv", k, state)) / (1 + np.exp(-b.astype(float)))[:, None]
        state = state + k[:, :, None] * u[:, None]
        return (state, before[1:]), np.einsum("hk,hkv->hv", q, state)


class Rounds:
    """A batch that is advanced by the functions under test, and by the truth."""

    def __init__(self, shape: Shape, pending: int, rng: np.random.Generator, block: Callable, prefill: Callable, **kw):
        self.shape, self.rng, self.block, self.prefill = shape, rng, block, prefill
        self.weights = weights(shape, rng, **kw)
        self.truth = Truth(shape, self.weights)
        self.places = [self.truth.start] * shape.B
        self.state = jnp.zeros((shape.B, shape.Hv, shape.Dk, shape.Dv))
        self.tail = jnp.zeros((shape.B, shape.taps - 1, shape.Hk, shape.C))
        self.pending = Pending.empty(shape.B, pending, shape.Hk, shape.Hv, shape.Dk, shape.Dv)

    def run_prefill(self, length: int, count: list[int]) -> None:
        given = rows(self.shape, self.rng, length)
        unused = np.arange(length)[None] >= np.array(count)[:, None]
        spoilt = [np.where(unused.reshape(unused.shape + (1,) * (x.ndim - 2)), np.nan, x) for x in given]
        counts = jnp.asarray(count)
        arguments = [jnp.asarray(x, jnp.float32) for x in (*spoilt, *self.weights)]
        out, self.state = self.prefill(self.state, self.pending, self.tail, *arguments, counts)
        for s, n in enumerate(count):
            for i in range(n):
                self.places[s], want = self.truth.step(self.places[s], *(x[s, i] for x in given))
                close(out[s, i], want)
        self.tail = tail_after(self.tail, arguments[0], counts)
        self.pending = spoil(jax.tree.map(jnp.zeros_like, self.pending))
        self.pending = replace(self.pending, fold=jnp.ones_like(self.pending.fold))
        self.check()

    def run_block(self, count: int, tree: bool) -> None:
        """A block, and a random path through it accepted; what is left of the others is spoilt."""
        given = rows(self.shape, self.rng, count)
        chain = np.tile(np.arange(count, dtype=np.int32) - 1, (self.shape.B, 1))
        parents = random_parents(self.shape, self.rng, count) if tree else chain
        arguments = [jnp.asarray(x) for x in (*given, *self.weights)]
        end = (jnp.asarray(parents),) if tree else ()
        out, self.state, left = self.block(self.state, self.pending, self.tail, *arguments, *end)
        paths, accepted = np.full((self.shape.B, count), -1, np.int32), []
        for s in range(self.shape.B):
            places: dict[int, Any] = {-1: self.places[s]}
            for i in range(count):
                places[i], want = self.truth.step(places[int(parents[s, i])], *(x[s, i] for x in given))
                close(out[s, i], want)
            last = int(self.rng.integers(-1, count))
            path = path_to(parents[s], last)
            paths[s, : len(path)] = path
            accepted.append(len(path))
            self.places[s] = places[last]
        counts = jnp.asarray(accepted)
        end = (jnp.asarray(paths),) if tree else ()
        self.tail = tail_after(self.tail, arguments[0], counts, *end)
        self.pending = spoil(committed(left, counts, *end))
        self.check()

    def check(self) -> None:
        """The state with the pending rows folded in, and the convolution's tail."""
        close(folded(self.state, self.pending), np.stack([state for state, _ in self.places]))
        np.testing.assert_array_equal(self.tail, np.stack([before for _, before in self.places]).astype(np.float32))


def close(got: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-4)


def spoil(pending: Pending) -> Pending:
    """NaN where nothing is pending; for a key head where none of its value heads has the row."""
    r = pending.weight.shape[1] // pending.k.shape[1]
    unused = np.asarray(pending.weight) == 0
    of_key = unused.reshape(unused.shape[0], -1, r, unused.shape[-1]).all(2)
    k, u = (np.where(x[..., None], np.nan, y) for x, y in ((of_key, pending.k), (unused, pending.u)))
    return replace(pending, k=jnp.asarray(k, jnp.float32), u=jnp.asarray(u, jnp.float32))
