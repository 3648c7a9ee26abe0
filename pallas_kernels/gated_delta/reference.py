"""Gated DeltaNet's mixing of rows, with its commit deferred: the definition, in jnp, fp32.

Causal convolution and silu, unit length of q and k, gates, then the rule (arXiv 2412.06464), for a value head with
state S [Dk, Dv]: S = exp(g) S; u = beta (v - S^T k); S = S + k u^T; o = S^T q.
For W rows from S0, each with its ancestors (in a chain all rows before it), with G_i the sum of g over the path to row
i and decay_ij = exp(G_i - G_j) where j is i or an ancestor of i, else 0:

    (I + A) U = beta (V - exp(G) K S0),   A_ij = beta_i decay_ij (k_i . k_j) off the diagonal
    O = exp(G) Q S0 + (decay * Q K^T) U
    S after row n = exp(G_n) S0 + sum over the path to n of exp(G_n - G_j) k_j u_j^T

u_j depends on row j's ancestors only, so any path can be committed afterwards without solving again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.gated_delta.pending import Pending, Rows
from pallas_kernels.gated_delta.products import product, turned, unit_lower_inverse
from pallas_kernels.gated_delta.tree import ancestors, sources

FEW = 8  # rows whose products with their u are added up one by one: 0.13 ms for 16 sequences on the CPU, not 0.27


def gated_delta_block(
    state: Float[Array, "B Hv Dk Dv"],
    pending: Pending,
    tail: Float[Array, "B R Hk C"],
    mixed: Float[Array, "B W Hk C"],
    b: Float[Array, "B W Hv"],
    a: Float[Array, "B W Hv"],
    taps: Float[Array, "K Hk C"],
    A_log: Float[Array, "Hv"],
    dt_bias: Float[Array, "Hv"],
    parents: Int[Array, "B W"] | None = None,
) -> tuple[Float[Array, "B W Hv Dv"], Float[Array, "B Hv Dk Dv"], Rows]:
    """Outputs of W rows, the state with `pending` folded in, and the rows to commit from. See the public function."""
    state = fold(state, pending)
    window = _window(tail, mixed, taps.shape[0], parents)
    q, k, v = _convolved(window, taps, *state.shape[1:3])
    beta, g = _gates(b, a, A_log, dt_bias)
    solved = _solve(q, k, beta, g, None if parents is None else ancestors(parents))
    out, u = _delta_rule(state, q, k, v, beta, solved)
    left = Rows(k=k.astype(pending.k.dtype), u=u.astype(pending.u.dtype), decay=solved.decay)
    return out.swapaxes(1, 2).astype(mixed.dtype), state, left


def gated_delta_prefill(
    state: Float[Array, "B Hv Dk Dv"],
    pending: Pending,
    tail: Float[Array, "B R Hk C"],
    mixed: Float[Array, "B T Hk C"],
    b: Float[Array, "B T Hv"],
    a: Float[Array, "B T Hv"],
    taps: Float[Array, "K Hk C"],
    A_log: Float[Array, "Hv"],
    dt_bias: Float[Array, "Hv"],
    count: Int[Array, "B"],
    documents: Int[Array, "B T"] | None = None,
    *,
    chunk: int = 16,
) -> tuple[Float[Array, "B T Hv Dv"], Float[Array, "B Hv Dk Dv"]]:
    """Outputs of T rows, the first `count[b]` of them real, and the state after those, chunk after chunk."""
    T = mixed.shape[1]
    chunk = min(chunk, T)
    pad = -T % chunk
    real = jnp.arange(T) < count[:, None]
    mixed = jnp.where(real[:, :, None, None], mixed, 0.0)
    window = _window(tail, mixed, taps.shape[0], None)
    if documents is not None:
        window = _inside(window, documents)
    q, k, v = _convolved(window, taps, *state.shape[1:3])
    # Rows with beta = 0 and g = 0 leave the state as it is.
    beta, g = (jnp.where(real[:, None], x, 0.0) for x in _gates(b, a, A_log, dt_bias))

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)

    def step(state: Array, given: tuple[tuple[Array, ...], _Solved, Any]) -> tuple[Array, Array]:
        (q, k, v, beta), solved, of = given
        path, carried = (None, None) if of is None else of
        out, u = _delta_rule(state, q, k, v, beta, solved, carried)
        if path is None or carried is None:
            left = Rows(k=k, u=u, decay=solved.decay).commit(jnp.full(state.shape[0], chunk))
        else:
            left = _last_document(k, u, solved.decay, path[:, -1], carried[:, -1])
        return fold(state, left), out

    q, k, v, beta, g = map(chunks, (q, k, v, beta, g))
    of = None if documents is None else _within(_with_previous(documents, chunk))
    solved = _solve(q, k, beta, g, None if of is None else of[0])  # of all chunks at once
    # A gradient makes a chunk anew from its state: quicker on a CPU than to keep what it is made of.
    step = jax.checkpoint(step, prevent_cse=False)
    state, out = jax.lax.scan(step, fold(state, pending), ((q, k, v, beta), solved, of))
    out = jnp.moveaxis(out, 0, 2)
    out = out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :T]
    return out.swapaxes(1, 2).astype(mixed.dtype), state


def _with_previous(documents: Int[Array, "B T"], chunk: int) -> Int[Array, "n B 1+chunk"]:
    """The documents of each chunk's rows, and before them that of the row before the chunk."""
    numbers = jnp.pad(documents, ((0, 0), (1, -documents.shape[1] % chunk)), mode="edge")
    at = jnp.arange(0, numbers.shape[1] - 1, chunk)[:, None] + jnp.arange(chunk + 1)
    return numbers[:, at].swapaxes(0, 1)


def _within(numbers: Int[Array, "n B 1+chunk"]) -> tuple[Bool[Array, "n B W W"], Bool[Array, "n B W"]]:
    """Of chunks' rows: which rows before it a row's document holds, and whether the state is of its document."""
    own = numbers[..., 1:]
    same = own[..., :, None] == own[..., None, :]
    return same & jnp.tri(own.shape[-1], dtype=bool), own == numbers[..., :1]


def _last_document(
    k: Float[Array, "B Hk W Dk"],
    u: Float[Array, "B Hv W Dv"],
    decay: Float[Array, "B Hv W"],
    kept: Bool[Array, "B W"],
    carried: Bool[Array, "B"],
) -> Pending:
    """The rows of the document that goes on behind the chunk; the state before it counts if it is of that document."""
    last, kept = decay[..., -1:], kept[:, None]
    weight = jnp.where(kept, jnp.exp(jnp.where(kept, last - decay, 0.0)), 0.0)
    return Pending(k=k, u=u, weight=weight, fold=jnp.where(carried[:, None], jnp.exp(last[..., 0]), 0.0))


def _inside(window: list[Array], documents: Int[Array, "B T"]) -> list[Array]:
    """The convolution's inputs without those of another document; what comes before row 0 is of the first one."""
    R, T = len(window) - 1, documents.shape[1]
    numbers = jnp.pad(documents, ((0, 0), (R, 0)), mode="edge")
    return [
        jnp.where((numbers[:, i : i + T] == documents)[:, :, None, None], x, jnp.zeros_like(x))
        for i, x in enumerate(window)
    ]


def fold(state: Float[Array, "B Hv Dk Dv"], pending: Pending) -> Float[Array, "B Hv Dk Dv"]:
    """Bring the accepted rows of the last block into the state."""
    k = jnp.repeat(pending.k, state.shape[1] // pending.k.shape[1], axis=1).astype(jnp.float32)
    weight = pending.weight[..., None]
    weighted = jnp.where(weight != 0, k * weight, 0.0)
    u = jnp.where(weight != 0, pending.u.astype(jnp.float32), 0.0)
    kept = pending.fold[..., None, None] * state
    if len(state) == 1 or k.shape[2] > FEW:
        return kept + product(turned(weighted), u)
    return sum((weighted[:, :, i, :, None] * u[:, :, i, None] for i in range(k.shape[2])), kept)


def _window(tail: Array, mixed: Array, taps: int, parents: Array | None) -> list[Array]:
    """The convolution's inputs, oldest tap first, each [B W Hk C]: a row's nearest ancestors and itself."""
    history = jnp.concatenate([tail, mixed], 1)
    if parents is None:
        return [history[:, i : i + mixed.shape[1]] for i in range(taps)]
    found = sources(parents, taps)
    return [jnp.take_along_axis(history, found[:, :, d, None, None], 1) for d in reversed(range(taps))]


def _convolved(window: list[Array], taps: Array, v_heads: int, k_dim: int) -> tuple[Array, Array, Array]:
    """q, k [B Hk W Dk] of unit length (q scaled) and v [B Hv W Dv], in fp32, after the causal convolution."""
    dtype, wide = window[0].dtype, jnp.float32
    mixed = sum((x.astype(wide) * tap.astype(dtype) for x, tap in zip(window, taps, strict=True)), jnp.zeros((), wide))
    mixed = jax.nn.silu(mixed.astype(dtype).astype(wide)).astype(dtype).astype(wide)  # rounded as a layer of its own
    q, k, v = jnp.split(mixed, [k_dim, 2 * k_dim], -1)
    v = v.reshape(*v.shape[:2], v_heads, -1)
    q, k, v = (y.swapaxes(1, 2) for y in (_unit(q) * k_dim**-0.5, _unit(k), v))
    return q, k, v


def _unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


def _gates(b: Array, a: Array, A_log: Array, dt_bias: Array) -> tuple[Float[Array, "B Hv W"], Float[Array, "B Hv W"]]:
    """How much of its error a row corrects (beta), and the log-decay of the state at it (g)."""
    b, a = b.swapaxes(1, 2), a.swapaxes(1, 2)
    beta = jax.nn.sigmoid(b).astype(jnp.float32)
    dt = a.astype(jnp.float32) + dt_bias.astype(jnp.float32)[:, None]
    return beta, -jnp.exp(A_log.astype(jnp.float32))[:, None] * jax.nn.softplus(dt)


class _Solved(NamedTuple):
    """What rows are to each other, whatever the state before them."""

    inverse: Float[Array, "... Hv W W"] | None  # of I + A; None for one row
    mixing: Float[Array, "... Hv W W"]  # decay * Q K^T
    decay: Float[Array, "... Hv W"]  # G


def _solve(
    q: Float[Array, "... Hk W Dk"],
    k: Float[Array, "... Hk W Dk"],
    beta: Float[Array, "... Hv W"],
    g: Float[Array, "... Hv W"],
    path: Bool[Array, "... W W"] | None = None,
) -> _Solved:
    """Of W rows; `path` marks a row and its ancestors, or all rows before it if None."""
    W, r = q.shape[-2], beta.shape[-2] // q.shape[-3]
    inner = product(jnp.concatenate([k, q], axis=-2), k.swapaxes(-1, -2))
    inner = jnp.repeat(inner, r, axis=-3)  # [... Hv 2W W]
    decay = jnp.cumsum(g, -1) if path is None else product(g, path.astype(jnp.float32).swapaxes(-1, -2))
    if W == 1:
        return _Solved(None, inner[..., 1:, :], decay)
    lower = jnp.tril(jnp.ones((W, W), bool)) if path is None else path[..., None, :, :]
    gap = decay[..., :, None] - decay[..., None, :]
    between = jnp.where(lower, jnp.exp(jnp.where(lower, gap, 0.0)), 0.0)
    strict = beta[..., None] * jnp.where(jnp.eye(W, dtype=bool), 0.0, between) * inner[..., :W, :]
    return _Solved(unit_lower_inverse(strict), between * inner[..., W:, :], decay)


def _delta_rule(
    state: Float[Array, "B Hv Dk Dv"],
    q: Float[Array, "B Hk W Dk"],
    k: Float[Array, "B Hk W Dk"],
    v: Float[Array, "B Hv W Dv"],
    beta: Float[Array, "B Hv W"],
    solved: _Solved,
    carried: Bool[Array, "B W"] | None = None,
) -> tuple[Float[Array, "B Hv W Dv"], Float[Array, "B Hv W Dv"]]:
    """Outputs and u of W rows from `state`. Rows that are not `carried` begin from an empty state."""
    W, r = q.shape[2], v.shape[1] // q.shape[1]
    from_state = product(jnp.repeat(jnp.concatenate([k, q], axis=2), r, axis=1), state)  # [B Hv 2W Dv]
    grown = jnp.exp(solved.decay)[..., None]
    if carried is not None:
        grown = jnp.where(carried[:, None, :, None], grown, 0.0)
    u = beta[..., None] * (v - grown * from_state[:, :, :W])
    if solved.inverse is None:
        mixed = solved.mixing * u
    else:
        u = product(solved.inverse, u)
        mixed = product(solved.mixing, u)
    return grown * from_state[:, :, W:] + mixed, u
