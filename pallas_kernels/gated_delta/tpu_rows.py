"""The maths of a few rows inside a TPU kernel, on values in VMEM: convolution, gates, the delta rule of one head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 16  # rows solved by substitution on the vector unit; blocks of them are joined by products


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """A product in full fp32: six passes of the matrix unit."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Row (axis 0) or column numbers."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def column(x: jax.Array, index: jax.Array | int) -> jax.Array:
    """Column `index` of x [W, H] as [W, 1]; the index may be a traced one."""
    return jnp.sum(jnp.where(iota(x.shape, 1) == index, x, 0.0), 1, keepdims=True)


def as_row(x: jax.Array) -> jax.Array:
    """[W, 1] as [1, W]."""
    W = x.shape[0]
    return jnp.sum(jnp.where(iota((W, W), 0) == iota((W, W), 1), x, 0.0), 0, keepdims=True)


def as_column(x: jax.Array) -> jax.Array:
    """[1, W] as [W, 1]."""
    W = x.shape[1]
    return jnp.sum(jnp.where(iota((W, W), 0) == iota((W, W), 1), x, 0.0), 1, keepdims=True)


def chain_sources(rows: int, taps: int) -> list[jax.Array]:
    """For 0 to taps - 1 tokens before each row: where that input stands in the tail and then the rows, [W, 1]."""
    return [iota((rows, 1), 0) + (taps - 1 - before) for before in range(taps)]


def convolved(
    mixed: jax.Array, tail: jax.Array, taps: jax.Array, sources: list[jax.Array], k_dim: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k [W, Dk] and v [W, r Dv] in fp32 from mixed [W, C], the rows before it [R, C] and the taps [R + 1, C].

    Rows are fetched by products with 0 and 1, which serve chains and trees alike and are exact.
    """
    dtype, (W, _), R = mixed.dtype, mixed.shape, tail.shape[0]
    exact = None if dtype == jnp.bfloat16 else lax.Precision.HIGHEST

    def fetch(chosen: jax.Array, rows: jax.Array) -> jax.Array:
        chosen = jnp.where(chosen, 1.0, 0.0).astype(dtype)
        return jnp.dot(chosen, rows, precision=exact, preferred_element_type=jnp.float32)

    taps = taps.astype(dtype).astype(jnp.float32)
    total = jnp.zeros(mixed.shape, jnp.float32)
    for before in range(R, -1, -1):  # oldest first, as the reference adds
        if before:
            at = sources[before]
            found = fetch(iota((W, R), 1) == at, tail)
            found = found if W == 1 else found + fetch(iota((W, W), 1) + R == at, mixed)
        else:
            found = mixed.astype(jnp.float32)
        total = total + found * taps[R - before : R - before + 1]
    x = total.astype(dtype).astype(jnp.float32)
    x = (x * jax.nn.sigmoid(x)).astype(dtype).astype(jnp.float32)
    q, k, v = x[:, :k_dim], x[:, k_dim : 2 * k_dim], x[:, 2 * k_dim :]
    return _unit(q) * k_dim**-0.5, _unit(k), v


def _unit(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.sum(x * x, 1, keepdims=True) + 1e-6)


def gates(b: jax.Array, a: jax.Array, A_log: jax.Array, dt_bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """beta and g [W, Hv] in fp32 from b, a [W, Hv] and A_log, dt_bias [1, Hv]."""
    beta = jax.nn.sigmoid(b.astype(jnp.float32)).astype(b.dtype).astype(jnp.float32)
    dt = a.astype(jnp.float32) + dt_bias.astype(jnp.float32)
    softplus = jnp.maximum(dt, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(dt)))
    return beta, -jnp.exp(A_log.astype(jnp.float32)) * softplus


def folded(state: jax.Array, fold: jax.Array, k: jax.Array, u: jax.Array, weight: jax.Array) -> jax.Array:
    """fold * S + sum_p weight_p k_p u_p^T for weight [P, 1]; rows of weight 0 may hold anything."""
    kept = weight != 0.0
    k = jnp.where(kept, k.astype(jnp.float32) * weight, 0.0)
    return fold * state + dot(k, jnp.where(kept, u.astype(jnp.float32), 0.0), (0, 0))


def delta_rule(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, decay: jax.Array, path: jax.Array,
    carried: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Outputs and u [W, Dv] of one value head; beta, decay (G) [W, 1]; path [W, W] marks a row and its ancestors.

    Rows that are not `carried` [W, 1] begin from an empty state.
    """
    W = q.shape[0]
    from_state = dot(jnp.concatenate([k, q], 0), state)
    grown = jnp.exp(decay) if carried is None else jnp.where(carried, jnp.exp(decay), 0.0)
    right = beta * (v - grown * from_state[:W])
    between = jnp.where(path, jnp.exp(jnp.where(path, decay - as_row(decay), 0.0)), 0.0)
    diagonal = iota((W, W), 0) == iota((W, W), 1)
    strict = jnp.where(diagonal, 0.0, beta * between * dot(k, k, (1, 1)))
    u = _solve(strict, right)
    return grown * from_state[W:] + dot(between * dot(q, k, (1, 1)), u), u


class Packed(NamedTuple):
    """Where the documents of a chunk of rows begin, of which the first `last + 1` rows are real."""

    since: jax.Array  # [W, 1]: how many rows before a row are of its document
    last: jax.Array  # []

    @classmethod
    def of(cls, since: jax.Array, left: jax.Array) -> "Packed":
        return cls(since, jnp.minimum(left, since.shape[0]) - 1)

    @property
    def carried(self) -> jax.Array:
        """Whether a row's document began before the chunk [W, 1]."""
        return self.since > iota(self.since.shape, 0)

    def path(self, before: jax.Array) -> jax.Array:
        """Of the rows before each row [W, W], those of its document."""
        return before & (iota(before.shape, 0) - iota(before.shape, 1) <= self.since)

    def sources(self, at: list[jax.Array]) -> list[jax.Array]:
        """The convolution's inputs, without those of another document."""
        return [jnp.where(before <= self.since, x, -1) for before, x in enumerate(at)]

    def left(self, decay: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the state [1, 1] and each row [W, 1] weigh behind the chunk: only the last row's document goes on."""
        row = iota(self.since.shape, 0)
        here = row == self.last
        since = jnp.sum(jnp.where(here, self.since, 0), 0, keepdims=True)
        end = jnp.sum(jnp.where(here, decay, 0.0), 0, keepdims=True)
        kept = (row <= self.last) & (self.last - row <= since)
        weight = jnp.where(kept, jnp.exp(jnp.where(kept, end - decay, 0.0)), 0.0)
        return jnp.where(since > self.last, jnp.exp(end), 0.0), weight


def _solve(strict: jax.Array, right: jax.Array) -> jax.Array:
    """(I + strict)^-1 right for a strictly lower triangle, by forward substitution, block after block of rows."""
    solved: list[jax.Array] = []
    for start in range(0, right.shape[0], BLOCK):
        x = right[start : start + BLOCK]
        own = strict[start : start + BLOCK]
        if solved:
            x = x - dot(own[:, :start], jnp.concatenate(solved, 0))
        for j in range(x.shape[0] - 1):
            x = x - own[:, start + j : start + j + 1] * x[j : j + 1]
        solved.append(x)
    return jnp.concatenate(solved, 0)
