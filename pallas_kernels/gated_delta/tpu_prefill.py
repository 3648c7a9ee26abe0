"""Prefill on TPU: a group of heads keeps its state in VMEM while the chunks of rows pass by."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.dispatch import tuning
from pallas_kernels.gated_delta import tpu_rows as rows
from pallas_kernels.gated_delta.pending import Pending
from pallas_kernels.gated_delta.sizes import Sizes


def gated_delta_prefill(
    state: Array, pending: Pending, tail: Array, mixed: Array, b: Array, a: Array, taps: Array, A_log: Array,
    dt_bias: Array, count: Array, documents: Array | None = None, *, tiles: dict[str, int] | None = None,
    interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """As the public function; tiles as in tuning.json. Of packed documents every row of `count` is real."""
    n = Sizes.of(state, pending, tail, mixed, b, taps)
    tuned = tiles or tuning(__file__)["default"]["prefill"]
    heads, chunk = n.group(tuned["heads"]), min(tuned["chunk"], n.W)
    groups, v_heads, flat = n.Hk // heads, heads * n.r, n.Hk * n.C

    def by_head(*inner: int) -> pl.BlockSpec:  # [B, heads, ...]: the same for all chunks
        return pl.BlockSpec((None, *inner), lambda s, h, c, *_: (s, h, 0, 0))

    def by_chunk(width: int) -> pl.BlockSpec:  # [B, rows, columns of the group]
        return pl.BlockSpec((None, chunk, width), lambda s, h, c, *_: (s, c, h))

    def fixed(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0, 0))

    gates_of_chunk = pl.BlockSpec((None, chunk, n.Hv), lambda s, h, c, *_: (s, c, 0))
    by_group = pl.BlockSpec((None, None, v_heads, n.P), lambda s, h, c, *_: (s, h, 0, 0))
    tail_of_group = pl.BlockSpec((None, n.R, heads * n.C), lambda s, h, c, *_: (s, 0, h))
    packed = [x.reshape(1, n.Hv) for x in (A_log, dt_bias)]
    since = [] if documents is None else [_since(documents, n.R)[..., None]]
    taps = taps.reshape(-1, flat)
    out, state = pl.pallas_call(
        partial(_kernel, n=n, heads=heads, chunk=chunk, documents=bool(since)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(n.B, groups, pl.cdiv(n.W, chunk)),
            in_specs=[
                by_head(v_heads, n.Dk, n.Dv), by_head(heads, n.P, n.Dk), by_head(v_heads, n.P, n.Dv), by_group,
                tail_of_group, by_chunk(heads * n.C), gates_of_chunk, gates_of_chunk, fixed(taps), *map(fixed, packed),
                *(pl.BlockSpec((None, chunk, 1), lambda s, h, c, *_: (s, c, 0)) for _ in since),
            ],
            out_specs=[by_chunk(v_heads * n.Dv), by_head(v_heads, n.Dk, n.Dv)],
            scratch_shapes=[pltpu.VMEM((n.R, heads * n.C), mixed.dtype)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((n.B, n.W, n.Hv * n.Dv), mixed.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ],
        input_output_aliases={2: 1},  # the state, in place
        cost_estimate=n.prefill_cost(groups, chunk),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(
        count.astype(jnp.int32), pending.fold, state, pending.k, pending.u,
        pending.weight.reshape(n.B, groups, v_heads, n.P), tail.reshape(n.B, n.R, flat),
        mixed.reshape(n.B, n.W, flat), b, a, taps, *packed, *since,
    )  # fmt: skip
    return out.reshape(n.B, n.W, n.Hv, n.Dv), state


def _since(documents: Array, reach: int) -> Array:
    """How many rows before a row are of its document [B, T]; more than there are for the first document."""
    at = jnp.arange(documents.shape[1], dtype=jnp.int32)
    changes = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(changes, at, 0), axis=1)
    return jnp.where(start == 0, documents.shape[1] + reach, at - start)


def _kernel(
    count_ref, fold_ref, old_ref, pk_ref, pu_ref, weight_ref, before_ref, mixed_ref, b_ref, a_ref, taps_ref, A_ref,
    dt_ref, *refs, n: Sizes, heads: int, chunk: int, documents: bool,
) -> None:  # fmt: skip
    """One chunk; the state stays in its output block, and the chunk's last rows in `tail_ref`, for the next one."""
    since_ref, out_ref, state_ref, tail_ref = refs if documents else (None, *refs)
    s, group, c = (pl.program_id(axis) for axis in range(3))
    left = count_ref[s] - c * chunk  # real rows in this chunk and after it

    @pl.when(c == 0)
    def _() -> None:
        tail_ref[...] = before_ref[...]
        for h in range(heads * n.r):
            fold = fold_ref[s, group * heads * n.r + h]
            weight = rows.as_column(weight_ref[h : h + 1])
            state_ref[h] = rows.folded(old_ref[h], fold, pk_ref[h // n.r], pu_ref[h], weight)

    @pl.when(left <= 0)
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(left > 0)
    def _() -> None:
        real = rows.iota((chunk, 1), 0) < left
        path = rows.iota((chunk, chunk), 0) >= rows.iota((chunk, chunk), 1)
        at = rows.chain_sources(chunk, n.R + 1)
        packed = None if since_ref is None else rows.Packed.of(since_ref[...], left)
        if packed is not None:
            path, at = packed.path(path), packed.sources(at)
        beta, g = rows.gates(b_ref[...], a_ref[...], A_ref[...], dt_ref[...])
        beta, g = (jnp.where(real, x, 0.0) for x in (beta, g))  # such rows leave the state as it is
        decay = rows.dot(jnp.where(path, 1.0, 0.0), g)
        for i in range(heads):
            columns = pl.ds(i * n.C, n.C)
            of_taps = taps_ref[:, pl.ds(pl.multiple_of((group * heads + i) * n.C, 128), n.C)]
            mixed = jnp.where(real, mixed_ref[:, columns], 0.0)
            q, k, v = rows.convolved(mixed, tail_ref[:, columns], of_taps, at, n.Dk)
            for j in range(n.r):
                h = i * n.r + j
                head = group * heads * n.r + h
                G = rows.column(decay, head)
                state = state_ref[h]
                of_v = v[:, j * n.Dv : (j + 1) * n.Dv]
                carried = None if packed is None else packed.carried
                out, u = rows.delta_rule(state, q, k, of_v, rows.column(beta, head), G, path, carried)
                out_ref[:, h * n.Dv : (h + 1) * n.Dv] = out.astype(out_ref.dtype)
                last = G[chunk - 1 :]
                fold, weight = (jnp.exp(last), jnp.exp(last - G)) if packed is None else packed.left(G)
                state_ref[h] = rows.folded(state, fold, k, u, weight)
        if chunk >= n.R:  # else there is no next chunk
            tail_ref[...] = mixed_ref[chunk - n.R :]
