"""The gated delta rule over a block of rows, with its commit deferred: the definition, in jnp, fp32.

The rule (arXiv 2412.06464), for a value head with state S [Dk, Dv]: S = exp(g) S; u = beta (v - S^T k); S = S + k u^T;
o = S^T q.
For a chain of W rows from S0, with G the running sum of g and decay_ij = exp(G_i - G_j) for j <= i:

    (I + A) U = beta (V - exp(G) K S0),   A_ij = beta_i decay_ij (k_i . k_j) below the diagonal
    O = exp(G) Q S0 + (decay * Q K^T) U
    S after row n = exp(G_n) S0 + sum_{j <= n} exp(G_n - G_j) k_j u_j^T

u_j depends on rows up to j only, so a prefix of the rows can be committed afterwards without solving again.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_product = partial(jnp.matmul, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pending:
    """Accepted rows that the state does not hold yet: S = fold * S + sum_p weight_p k_p u_p^T."""

    k: Float[Array, "B Hk P Dk"]
    u: Float[Array, "B Hv P Dv"]
    weight: Float[Array, "B Hv P"]
    fold: Float[Array, "B Hv"]

    @classmethod
    def empty(cls, batch: int, rows: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int) -> "Pending":
        return cls(
            k=jnp.zeros((batch, k_heads, rows, k_dim)),
            u=jnp.zeros((batch, v_heads, rows, v_dim)),
            weight=jnp.zeros((batch, v_heads, rows)),
            fold=jnp.ones((batch, v_heads)),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What a block leaves behind so that any prefix of it can be committed later."""

    k: Float[Array, "B Hk W Dk"]
    u: Float[Array, "B Hv W Dv"]
    decay: Float[Array, "B Hv W"]  # G: log-decay from the state to each row

    def commit(self, count: Int[Array, "B"]) -> Pending:
        """The first `count[b]` rows become pending; none for 0."""
        kept = jnp.arange(self.decay.shape[-1]) < count[:, None, None]
        last = jnp.min(jnp.where(kept, self.decay, 0.0), -1)  # decay falls along the chain, so its least is the last's
        weight = jnp.where(kept, jnp.exp(jnp.where(kept, last[..., None] - self.decay, 0.0)), 0.0)
        return Pending(k=self.k, u=self.u, weight=weight, fold=jnp.exp(last))


def fold(state: Float[Array, "B Hv Dk Dv"], pending: Pending) -> Float[Array, "B Hv Dk Dv"]:
    """Bring the accepted rows of the last block into the state."""
    k = jnp.repeat(pending.k, state.shape[1] // pending.k.shape[1], axis=1)
    rows = _product((k * pending.weight[..., None]).swapaxes(-1, -2), pending.u)
    return pending.fold[..., None, None] * state + rows


def _unit_lower_inverse(a: Float[Array, "... W W"]) -> Float[Array, "... W W"]:
    """(I + A)^-1 for A strictly lower triangular, by doubling: log2(W) small products."""
    W = a.shape[-1]
    inverse, power, reached = jnp.eye(W) - a, a, 2
    while reached < W:
        power = _product(power, power)
        inverse = inverse + _product(inverse, power)
        reached *= 2
    return inverse


def gated_delta_block(
    state: Float[Array, "B Hv Dk Dv"],
    q: Float[Array, "B Hk W Dk"],
    k: Float[Array, "B Hk W Dk"],
    v: Float[Array, "B Hv W Dv"],
    beta: Float[Array, "B Hv W"],
    g: Float[Array, "B Hv W"],
) -> tuple[Float[Array, "B Hv W Dv"], Rows]:
    """Outputs of W rows from `state`, which is left as it is, and the rows to commit from. q and k are normalised."""
    W, r = q.shape[2], v.shape[1] // q.shape[1]
    kq = jnp.concatenate([k, q], axis=2)
    inner = jnp.repeat(_product(kq, k.swapaxes(-1, -2)), r, axis=1)  # [B Hv 2W W]
    from_state = _product(jnp.repeat(kq, r, axis=1), state)  # [B Hv 2W Dv]
    decay = jnp.cumsum(g, -1)
    grown = jnp.exp(decay)[..., None]
    u = beta[..., None] * (v - grown * from_state[:, :, :W])
    if W > 1:
        lower = jnp.tril(jnp.ones((W, W), bool))
        gap = decay[..., :, None] - decay[..., None, :]
        between = jnp.where(lower, jnp.exp(jnp.where(lower, gap, 0.0)), 0.0)
        strict = beta[..., None] * jnp.where(jnp.eye(W, dtype=bool), 0.0, between) * inner[:, :, :W]
        u = _product(_unit_lower_inverse(strict), u)
        mixed = _product(between * inner[:, :, W:], u)
    else:
        mixed = inner[:, :, W:] * u
    return grown * from_state[:, :, W:] + mixed, Rows(k=k, u=u, decay=decay)


def gated_delta_prefill(
    state: Float[Array, "B Hv Dk Dv"],
    q: Float[Array, "B Hk T Dk"],
    k: Float[Array, "B Hk T Dk"],
    v: Float[Array, "B Hv T Dv"],
    beta: Float[Array, "B Hv T"],
    g: Float[Array, "B Hv T"],
    *,
    chunk: int = 16,
) -> tuple[Float[Array, "B Hv T Dv"], Float[Array, "B Hv Dk Dv"]]:
    """Outputs of T rows and the state after them, block after block. Rows with beta = 0 and g = 0 do not count."""
    T = q.shape[2]
    chunk = min(chunk, T)
    pad = -T % chunk

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)

    def step(state: Array, rows: tuple[Array, ...]) -> tuple[Array, Array]:
        out, left = gated_delta_block(state, *rows)
        everything = jnp.full(state.shape[0], chunk)
        return fold(state, left.commit(everything)), out

    state, out = jax.lax.scan(step, state, tuple(map(chunks, (q, k, v, beta, g))))
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :T], state
