"""Blocks of a chain and prefill on GPU (Mosaic GPU, Hopper): a warpgroup holds one value head's state in registers.

The matrix units take no fp32, so the rule runs row after row on the vector units, where it is exact and needs no
inverse: four multiply-adds an element of the state and row. Trees run the reference.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import hopper
from pallas_kernels.gated_delta.pending import Pending, Rows
from pallas_kernels.gated_delta.sizes import Sizes

HEAD = 128  # the only head size: one element of q, k and v for each thread of a warpgroup
# A warp holds 32 columns (of Dv) of the state, a thread 4 of them in every fourth row: rows are read whole, and sums
# over Dk stay within four threads.
_TILES = plgpu.Tiling(((4, HEAD), (4, 32), (4,)))
STATE = plgpu.Layout.TILED(_TILES, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
BY_K, BY_V, BY_THREAD = STATE.reduce(1), STATE.reduce(0), plgpu.Layout.WG_STRIDED((HEAD,), vec_size=1)


def gated_delta_block(
    state: Array, pending: Pending, tail: Array, mixed: Array, b: Array, a: Array, taps: Array, A_log: Array,
    dt_bias: Array, parents: None = None,
) -> tuple[Array, Array, Rows]:  # fmt: skip
    """As the public function, for chains."""
    n = Sizes.of(state, pending, tail, mixed, b, taps)
    outputs = [
        jax.ShapeDtypeStruct((n.B, n.W, n.Hv, n.Dv), mixed.dtype),
        jax.ShapeDtypeStruct((n.B, n.Hk, n.W, n.Dk), pending.k.dtype),
        jax.ShapeDtypeStruct((n.B, n.Hv, n.W, n.Dv), pending.u.dtype),
        jax.ShapeDtypeStruct((n.B, n.Hv, n.W), jnp.float32),
    ]
    count = jnp.full(n.B, n.W, jnp.int32)
    given = pending, tail, mixed, b, a, taps, A_log, dt_bias, count
    (out, k, u, decay), state = _run(n, outputs, state, *given, deferred=True)
    return out, state, Rows(k=k, u=u, decay=decay)


def gated_delta_prefill(
    state: Array, pending: Pending, tail: Array, mixed: Array, b: Array, a: Array, taps: Array, A_log: Array,
    dt_bias: Array, count: Array, documents: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """As the public function."""
    n = Sizes.of(state, pending, tail, mixed, b, taps)
    outputs = [jax.ShapeDtypeStruct((n.B, n.W, n.Hv, n.Dv), mixed.dtype)]
    given = pending, tail, mixed, b, a, taps, A_log, dt_bias, count
    begins = [] if documents is None else [_begins(documents)]
    (out,), state = _run(n, outputs, state, *given, *begins, deferred=False)
    return out, state


def _begins(documents: Array) -> Array:
    """1 where a document begins [B, T], but for the first one, which goes on from what is given."""
    return jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0))).astype(jnp.int32)


def _run(
    n: Sizes, outputs: list[jax.ShapeDtypeStruct], state: Array, pending: Pending, tail: Array, mixed: Array,
    *rest: Array, deferred: bool,
) -> tuple[list[Array], Array]:  # fmt: skip
    """The outputs, and the state, which the kernel changes where it stands."""
    b, a, taps, A_log, dt_bias, count, *begins = rest
    tail, mixed, taps = (x.reshape(*x.shape[:-2], n.Hk * n.C) for x in (tail, mixed, taps))
    kept = pending.k, pending.u, pending.weight, pending.fold
    body = partial(_body, n=n, deferred=deferred, packed=bool(begins))

    def with_scratch(*refs: Any) -> None:
        pl.run_scoped(partial(body, *refs), *[plgpu.SMEM((HEAD,), jnp.float32)] * 3, collective_axes=())

    # `pl.kernel` and not `plgpu.kernel`, which takes no reference that it may write to.
    mesh = plgpu.Mesh(grid=(n.Hv, n.B), grid_names=("head", "sequence"))
    kernel: Any = pl.kernel(with_scratch, out_type=outputs, mesh=mesh)
    in_place = jax.new_ref(state, memory_space=plgpu.GMEM)
    outs = kernel(in_place, *kept, tail, mixed, b, a, taps, A_log, dt_bias, count.astype(jnp.int32), *begins)
    return outs, jax.freeze(in_place)


def _body(
    state_ref, pk_ref, pu_ref, weight_ref, fold_ref, tail_ref, mixed_ref, b_ref, a_ref, taps_ref, A_ref, dt_ref,
    count_ref, *refs, n: Sizes, deferred: bool, packed: bool,
) -> None:  # fmt: skip
    """One value head of one sequence; of `packed` ones, `refs` begin with the rows where a document begins."""
    *outs, q_smem, k_smem, v_smem = refs
    begins_ref, *outs = outs if packed else (None, *outs)
    out_ref = outs[0]
    h, s = lax.axis_index("head"), lax.axis_index("sequence")
    key_head = lax.div(h, jnp.int32(n.r))
    start = key_head * n.C
    columns = [start, start + n.Dk, start + 2 * n.Dk + (h - key_head * n.r) * n.Dv]

    state = hopper.load(state_ref.at[s, h], STATE) * fold_ref[s, h]
    state = _folded(state, pk_ref.at[s, key_head], pu_ref.at[s, h], weight_ref.at[s, h], n.P)
    if deferred:
        state_ref.at[s, h][...] = state
    taps = [[hopper.load(taps_ref.at[i, pl.ds(c, HEAD)], BY_THREAD).astype(mixed_ref.dtype).astype(jnp.float32)
             for i in range(n.R + 1)] for c in columns]  # fmt: skip
    rate, bias = jnp.exp(A_ref[h].astype(jnp.float32)), dt_ref[h].astype(jnp.float32)

    def one_row(t: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, decay, windows = carry
        goes_on = 1.0 if begins_ref is None else jnp.where(begins_ref[s, t] == 0, 1.0, 0.0)
        if packed:
            windows = jax.tree.map(lambda x: x * goes_on, windows)
        found = [
            _convolved(mixed_ref.at[s, t, pl.ds(column, HEAD)], before, of_column)
            for column, before, of_column in zip(columns, windows, taps, strict=True)
        ]
        windows, (q, k, v) = tuple(x for x, _ in found), (x for _, x in found)
        k = k * lax.rsqrt(jnp.sum(k * k) + 1e-6)
        q = q * (lax.rsqrt(jnp.sum(q * q) + 1e-6) * n.Dk**-0.5)
        for ref, x in ((q_smem, q), (k_smem, k), (v_smem, v)):
            ref[...] = x
        plgpu.commit_smem()
        if deferred:

            @pl.when(h == key_head * n.r)
            def _() -> None:
                outs[1].at[s, key_head, t][...] = k.astype(outs[1].dtype)

        q, k, v = hopper.load(q_smem, BY_K), hopper.load(k_smem, BY_K), hopper.load(v_smem, BY_V)
        beta = 1.0 / (1.0 + jnp.exp(-b_ref[s, t, h].astype(jnp.float32)))
        beta = beta.astype(b_ref.dtype).astype(jnp.float32)
        g = -rate * _softplus(a_ref[s, t, h].astype(jnp.float32) + bias)
        state = state * (jnp.exp(g) * goes_on)
        u = (v - jnp.sum(state * _spread(k, 0), 0)) * beta
        state = state + _spread(k, 0) * _spread(u, 1)
        out_ref.at[s, t, h][...] = jnp.sum(state * _spread(q, 0), 0).astype(out_ref.dtype)
        if deferred:
            outs[2].at[s, h, t][...] = u.astype(outs[2].dtype)
            outs[3][s, h, t] = decay + g
        return state, decay + g, windows

    windows = tuple(
        tuple(hopper.load(tail_ref.at[s, i, pl.ds(c, HEAD)], BY_THREAD).astype(jnp.float32) for i in range(n.R))
        for c in columns
    )
    state, *_ = lax.fori_loop(0, count_ref[s], one_row, (state, jnp.float32(0.0), windows))
    if not deferred:

        def nothing(t: Array, _: None) -> None:  # rows past the count: what was in memory could be NaN
            out_ref.at[s, t, h][...] = plgpu.layout_cast(jnp.zeros((HEAD,), out_ref.dtype), BY_THREAD)

        lax.fori_loop(count_ref[s], n.W, nothing, None)
        state_ref.at[s, h][...] = state


def _spread(x: Array, axis: int) -> Array:
    """Along the state's other axis."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (HEAD, HEAD), (axis,)), STATE)


def _folded(state: Array, k_ref: Any, u_ref: Any, weight_ref: Any, rows: int) -> Array:
    """The state with the pending rows; those of weight 0 may hold anything."""

    def one(p: Array, state: Array) -> Array:
        weight = weight_ref[p]

        def add(state: Array) -> Array:
            k = hopper.load(k_ref.at[p], BY_K).astype(jnp.float32)
            u = hopper.load(u_ref.at[p], BY_V).astype(jnp.float32)
            return state + _spread(k * weight, 0) * _spread(u, 1)

        return lax.cond(weight != 0.0, add, lambda state: state, state)

    return lax.fori_loop(0, rows, one, state)


def _convolved(row_ref: Any, before: tuple[Array, ...], taps: list[Array]) -> tuple[Any, Array]:
    """The rows before the next one, and this one after convolution and silu."""
    window = (*before, hopper.load(row_ref, BY_THREAD).astype(jnp.float32))
    x = sum((x * tap for x, tap in zip(window[1:], taps[1:], strict=True)), window[0] * taps[0])
    x = x.astype(row_ref.dtype).astype(jnp.float32)
    x = x / (1.0 + jnp.exp(-x))
    return window[1:], x.astype(row_ref.dtype).astype(jnp.float32)


def _softplus(x: Array) -> Array:
    """log(1 + exp(x)); by its series where 1 + exp(x) would lose digits."""
    small = jnp.exp(-jnp.abs(x))
    return jnp.maximum(x, 0.0) + jnp.where(small < 1e-3, small * (1.0 - 0.5 * small), jnp.log(1.0 + small))
