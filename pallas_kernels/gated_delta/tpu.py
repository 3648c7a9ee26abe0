"""A block of rows on TPU: one grid step holds a sequence's group of key heads, and reads and writes its state once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.dispatch import tuning
from pallas_kernels.gated_delta import tpu_rows as rows
from pallas_kernels.gated_delta.pending import Pending, Rows
from pallas_kernels.gated_delta.sizes import Sizes
from pallas_kernels.gated_delta.tree import ancestors, sources

MOST_ROWS = 128  # beyond, the rows solved one after the other would cost more than the state's way to the chip


def gated_delta_block(
    state: Array, pending: Pending, tail: Array, mixed: Array, b: Array, a: Array, taps: Array, A_log: Array,
    dt_bias: Array, parents: Array | None = None, *, tiles: dict[str, int] | None = None, interpret: Any = False,
) -> tuple[Array, Array, Rows]:  # fmt: skip
    """As the public function; tiles as in tuning.json."""
    n = Sizes.of(state, pending, tail, mixed, b, taps)
    heads = n.group((tiles or tuning(__file__)["default"]["block"])["heads"])
    groups, v_heads = n.Hk // heads, heads * n.r

    def block(*shape: int | None, at: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, at)

    def by_head(*inner: int) -> pl.BlockSpec:  # [B, heads, ...]
        return block(None, *inner, at=lambda s, h, *_: (s, h, 0, 0))

    def by_column(count: int, width: int) -> pl.BlockSpec:  # [B, rows, columns of the group]
        return block(None, count, width, at=lambda s, h, *_: (s, 0, h))

    def whole(*shape: int) -> pl.BlockSpec:  # of a sequence; fetched once for all its groups
        return block(None, *shape, at=lambda s, h, *_: (s, 0, 0))

    def fixed(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0, 0))

    flat = n.Hk * n.C
    packed = [x.reshape(1, n.Hv) for x in (A_log, dt_bias)]
    taps = taps.reshape(-1, flat)
    links = [] if parents is None else [ancestors(parents).astype(jnp.float32), sources(parents, n.R + 1)]
    by_group = block(None, None, v_heads, n.P, at=lambda s, h, *_: (s, h, 0, 0))
    out, state, k, u, decay = pl.pallas_call(
        partial(_kernel, n=n, heads=heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n.B, groups),
            in_specs=[
                by_head(v_heads, n.Dk, n.Dv), by_head(heads, n.P, n.Dk), by_head(v_heads, n.P, n.Dv), by_group,
                by_column(n.R, heads * n.C), by_column(n.W, heads * n.C), whole(n.W, n.Hv), whole(n.W, n.Hv),
                fixed(taps), *map(fixed, packed), *(whole(*x.shape[1:]) for x in links),
            ],
            out_specs=[
                by_column(n.W, v_heads * n.Dv), by_head(v_heads, n.Dk, n.Dv), by_head(heads, n.W, n.Dk),
                by_head(v_heads, n.W, n.Dv), block(None, None, v_heads, n.W, at=lambda s, h, *_: (s, h, 0, 0)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((n.B, n.W, n.Hv * n.Dv), mixed.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct((n.B, n.Hk, n.W, n.Dk), pending.k.dtype),
            jax.ShapeDtypeStruct((n.B, n.Hv, n.W, n.Dv), pending.u.dtype),
            jax.ShapeDtypeStruct((n.B, groups, v_heads, n.W), jnp.float32),
        ],
        input_output_aliases={1: 1},  # the state, in place
        cost_estimate=n.block_cost(tree=parents is not None),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(
        pending.fold, state, pending.k, pending.u, pending.weight.reshape(n.B, groups, v_heads, n.P),
        tail.reshape(n.B, n.R, flat), mixed.reshape(n.B, n.W, flat), b, a, taps, *packed, *links,
    )  # fmt: skip
    left = Rows(k=k, u=u, decay=decay.reshape(n.B, n.Hv, n.W))
    return out.reshape(n.B, n.W, n.Hv, n.Dv), state, left


def _kernel(
    fold_ref, state_ref, pk_ref, pu_ref, weight_ref, tail_ref, mixed_ref, b_ref, a_ref, taps_ref, A_ref, dt_ref,
    *refs, n: Sizes, heads: int,
) -> None:  # fmt: skip
    """The group's key heads in turn, each with its value heads; independent, so that their products overlap."""
    *links, out_ref, new_ref, k_ref, u_ref, decay_ref = refs
    s, group = pl.program_id(0), pl.program_id(1)
    if links:
        path, found = links[0][...] > 0.0, links[1][...]
        at = [found[:, d : d + 1] for d in range(n.R + 1)]
    else:
        path, at = rows.iota((n.W, n.W), 0) >= rows.iota((n.W, n.W), 1), rows.chain_sources(n.W, n.R + 1)
    beta, g = rows.gates(b_ref[...], a_ref[...], A_ref[...], dt_ref[...])
    decay = rows.dot(jnp.where(path, 1.0, 0.0), g)
    for i in range(heads):
        columns = pl.ds(i * n.C, n.C)
        of_taps = taps_ref[:, pl.ds(pl.multiple_of((group * heads + i) * n.C, 128), n.C)]
        q, k, v = rows.convolved(mixed_ref[:, columns], tail_ref[:, columns], of_taps, at, n.Dk)
        k_ref[i] = k.astype(k_ref.dtype)
        for j in range(n.r):
            h = i * n.r + j
            head = group * heads * n.r + h
            weight = rows.as_column(weight_ref[h : h + 1])
            state = rows.folded(state_ref[h], fold_ref[s, head], pk_ref[i], pu_ref[h], weight)
            new_ref[h] = state
            G = rows.column(decay, head)
            of_v = v[:, j * n.Dv : (j + 1) * n.Dv]
            out, u = rows.delta_rule(state, q, k, of_v, rows.column(beta, head), G, path)
            u_ref[h] = u.astype(u_ref.dtype)
            decay_ref[h : h + 1] = rows.as_row(G)
            out_ref[:, h * n.Dv : (h + 1) * n.Dv] = out.astype(out_ref.dtype)
