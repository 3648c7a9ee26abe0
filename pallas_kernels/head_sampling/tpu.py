"""Mosaic TPU: the vocabulary goes by tile after tile, and each tile's logits die in VMEM.

Up to 512 rows stay in VMEM, so that the matrix is read once. The logits of a tile lie in a scratch; groups of rows that
fit the registers go over them.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels.dispatch import tuning
from pallas_kernels.head_sampling.noise import gumbel
from pallas_kernels.head_sampling.reference import Projection, Samples, warm

LANES = 128
NOTHING = -math.inf
LAST = 2**31 - 1


def sample(
    hidden: Float[Array, "R D"],
    weight: Float[Array, "_ _"],
    given: Int32[Array, "R C"] | None,
    temperature: Float32[Array, "R"] | None,
    keys: UInt32[Array, "R 2"] | None,
    start: Int32[Array, ""],
    *,
    projection: Projection,
    slots: int,
    vocab: int | None,
    interpret: Any = False,
) -> Samples:
    """See `reference.sample`; up to 128 slots."""
    count, size = hidden.shape[0], projection.sizes(weight)[1]
    rows, tile, group, memory = _sizes(count, size)
    if weight.shape[1] % LANES and not weight.shape[0] % LANES:
        # XLA keeps such a matrix turned, because that pads less: as it is, the kernel would be given a copy.
        weight, projection = weight.T, replace(projection, layout="vd" if projection.layout == "dv" else "dv")
    model, padding = hidden.shape[1], -count % rows
    warmth = None if temperature is None else temperature[:, None]
    columns = {"hidden": hidden, "wanted": given, "temperature": warmth, "keys": keys}
    # Rows of padding need a temperature that can be divided by.
    inputs = {k: jnp.pad(v, ((0, padding), (0, 0)), constant_values=1) for k, v in columns.items() if v is not None}
    outputs = _outputs(count + padding, slots, inputs)
    scratch = {"logits": pltpu.VMEM((rows, tile), jnp.float32)}
    if keys is not None:
        scratch["drawn_noise"] = pltpu.VMEM((rows, 1), jnp.float32)

    def by_rows(array: Any) -> pl.BlockSpec:
        # One buffer: most calls have a single block of rows, and a second one would take the place of more rows.
        mode = pl.Buffered(1) if array.shape[0] == rows else None
        return pl.BlockSpec((rows, array.shape[1]), lambda i, j, start: (i, 0), pipeline_mode=mode)

    if projection.layout == "dv":
        tiles = pl.BlockSpec((model, tile), lambda i, j, start: (0, j))
    else:
        tiles = pl.BlockSpec((tile, model), lambda i, j, start: (j, 0))
    names = ("start", "weight", *inputs, *outputs, *scratch)
    static = {"projection": projection, "slots": slots, "size": size, "vocab": vocab, "group": group}
    found = pl.pallas_call(
        lambda *refs: _kernel(dict(zip(names, refs, strict=True)), **static),
        out_shape=list(outputs.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=((count + padding) // rows, pl.cdiv(size, tile)),
            in_specs=[tiles, *map(by_rows, inputs.values())],
            out_specs=[by_rows(array) for array in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=memory),
        cost_estimate=cost(hidden, weight, given, temperature, keys, projection=projection, slots=slots),
        interpret=interpret,
        name="head_sampling",
    )(start[None], weight, *inputs.values())
    kept = {name: value[:count] for name, value in zip(outputs, found, strict=True)}
    return Samples(
        values=kept["values"][:, :slots],
        ids=kept["ids"][:, :slots],
        given=kept.get("given"),
        total=kept["total"][:, 0] if "total" in kept else None,
        drawn_ids=kept.get("drawn_ids"),
        drawn_logits=kept.get("drawn_logits"),
    )


def _outputs(rows: int, slots: int, inputs: dict[str, Array]) -> dict[str, jax.ShapeDtypeStruct]:
    width = 1 if slots == 1 else LANES
    shapes = {"values": (width, jnp.float32), "ids": (width, jnp.int32)}
    if "wanted" in inputs:
        shapes["given"] = inputs["wanted"].shape[1], jnp.float32
    if "temperature" in inputs:
        shapes["total"] = 1, jnp.float32
    if "keys" in inputs:
        shapes |= {"drawn_ids": (1, jnp.int32), "drawn_logits": (1, jnp.float32)}
    return {name: jax.ShapeDtypeStruct((rows, width), dtype) for name, (width, dtype) in shapes.items()}


def _sizes(count: int, size: int) -> tuple[int, int, int, int]:
    """Rows of a block, tokens of a tile, rows of a group, and bytes of VMEM."""
    sizes = tuning(__file__)["default"]
    rows = min(sizes["rows"], -(-count // sizes["group"]) * sizes["group"])
    tile = sizes["tile"] if rows <= sizes["few_rows"] else sizes["tile_of_many_rows"]
    return rows, min(tile, -(-size // LANES) * LANES), sizes["group"], sizes["memory"]


def cost(
    hidden: Any, weight: Any, given: Any, temperature: Any, keys: Any, *, projection: Projection, slots: int
) -> pl.CostEstimate:
    """The matrix once for every block of rows, and everything else once. Takes arrays or their shapes."""
    count, (model, size) = hidden.shape[0], projection.sizes(weight)
    rows = _sizes(count, size)[0]
    count += -count % rows
    words = 2 * (1 if slots == 1 else LANES)
    words += 0 if given is None else 2 * given.shape[1]
    words += 0 if temperature is None else 2
    words += 0 if keys is None else 4
    functions = (temperature is not None) + 2 * (keys is not None) + (projection.soft_cap is not None)
    matrix = model * size * weight.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * count * model * size,
        transcendentals=functions * count * size,
        bytes_accessed=count // rows * matrix + count * (model * hidden.dtype.itemsize + 4 * words),
    )


def _kernel(
    refs: dict[str, Any], *, projection: Projection, slots: int, size: int, vocab: int | None, group: int
) -> None:
    """One tile: its logits, then group by group what is kept of them."""
    j = pl.program_id(1)
    rows, tile = refs["logits"].shape
    start = refs["start"][0]

    @pl.when(j == 0)
    def _() -> None:
        nothing = {"values": NOTHING, "given": NOTHING, "drawn_logits": NOTHING}
        zero = {"total": 0.0, "drawn_noise": 0.0, "ids": start, "drawn_ids": start}
        for name, value in (nothing | zero).items():
            if name in refs:
                refs[name][...] = jnp.full(refs[name].shape, value, refs[name].dtype)

    hidden = refs["hidden"][...]
    contract = (((1,), (0 if projection.layout == "dv" else 1,)), ((), ()))
    products = jax.lax.dot_general(
        hidden, refs["weight"][...].astype(hidden.dtype), contract, preferred_element_type=jnp.float32
    )
    refs["logits"][...] = projection.finish(products)

    @pl.loop(0, rows // group)
    def _(g: Array) -> None:
        rows = pl.ds(pl.multiple_of(g * group, group), group)
        place = j * tile + jax.lax.broadcasted_iota(jnp.int32, (group, tile), 1)
        ids = start + place
        # What lies behind the end of the matrix is anything.
        exists = place < size if vocab is None else (place < size) & (ids < vocab)
        logits = jnp.where(exists, refs["logits"][rows], NOTHING)
        before = refs["values"][rows, :1]
        rest = logits if "given" not in refs else _keep_given(refs, rows, logits, ids)
        if slots == 1:
            _keep_largest(refs, rows, logits, ids)
        else:
            refs["logits"][rows] = logits
            _keep_slots(refs, rows, ids, slots)
        top = refs["values"][rows, :1]
        if "total" in refs:
            temperature = refs["temperature"][rows]
            scale = jnp.exp(warm(before, top, temperature))
            added = jnp.sum(jnp.exp(warm(logits, top, temperature)), axis=1, keepdims=True)
            refs["total"][rows] = refs["total"][rows] * scale + added
        if "drawn_ids" in refs:
            _keep_drawn(refs, rows, rest, ids, top)


def _keep_given(refs: dict[str, Any], rows: Any, logits: Array, ids: Array) -> Array:
    """Note the given tokens' logits; returns the logits without them."""
    wanted, found, rest = refs["wanted"][rows], refs["given"][rows], logits
    lanes = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
    for c in range(wanted.shape[1]):
        hit = ids == wanted[:, c : c + 1]
        value = jnp.max(jnp.where(hit, logits, NOTHING), axis=1, keepdims=True)
        found = jnp.where(lanes == c, jnp.maximum(found, value), found)
        rest = jnp.where(hit, NOTHING, rest)
    refs["given"][rows] = found
    return rest


def _largest(scores: Array, ids: Array) -> tuple[Array, Array]:
    """The largest score of each row and its id, the lowest on ties."""
    top = jnp.max(scores, axis=1, keepdims=True)
    return top, jnp.min(jnp.where(scores == top, ids, LAST), axis=1, keepdims=True)


def _keep_largest(refs: dict[str, Any], rows: Any, logits: Array, ids: Array) -> None:
    value, id = _largest(logits, ids)
    # Strictly, so that the earlier tile keeps a tie.
    better = value > refs["values"][rows]
    refs["ids"][rows] = jnp.where(better, id, refs["ids"][rows])
    refs["values"][rows] = jnp.where(better, value, refs["values"][rows])


def _keep_slots(refs: dict[str, Any], rows: Any, ids: Array, slots: int) -> None:
    """Sort the tile's largest logits into the slots, one a row and step; most tiles need few steps. Eats the logits."""

    def step(_: Array) -> Array:
        logits, values = refs["logits"][rows], refs["values"][rows]
        value, id = _largest(logits, ids)
        refs["logits"][rows] = jnp.where(ids == id, NOTHING, logits)
        lanes = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
        # Behind its equals, which have lower ids.
        slot = jnp.sum((values >= value).astype(jnp.int32), axis=1, keepdims=True)
        taken = value > values[:, slots - 1 : slots]

        def insert(old: Array, new: Array) -> Array:
            inserted = jnp.where(lanes < slot, old, jnp.where(lanes == slot, new, pltpu.roll(old, 1, 1)))
            return jnp.where(taken, inserted, old)

        refs["values"][rows] = insert(values, value)
        refs["ids"][rows] = insert(refs["ids"][rows], id)
        return more()

    def more() -> Array:
        best = jnp.max(refs["logits"][rows], axis=1, keepdims=True)
        return jnp.max((best > refs["values"][rows, slots - 1 : slots]).astype(jnp.float32))

    jax.lax.while_loop(lambda go: go > 0, step, more())


def _keep_drawn(refs: dict[str, Any], rows: Any, rest: Array, ids: Array, top: Array) -> None:
    """The winner so far and the tile's best, both measured from the largest logit so far."""
    temperature = refs["temperature"][rows]
    noise = gumbel(refs["keys"][rows], ids)
    score, id = _largest(warm(rest, top, temperature) + noise, ids)
    there = ids == id
    new = {
        "drawn_ids": id,
        "drawn_logits": jnp.max(jnp.where(there, rest, NOTHING), axis=1, keepdims=True),
        "drawn_noise": jnp.max(jnp.where(there, noise, NOTHING), axis=1, keepdims=True),
    }
    better = score > warm(refs["drawn_logits"][rows], top, temperature) + refs["drawn_noise"][rows]
    for name, value in new.items():
        refs[name][rows] = jnp.where(better, value, refs[name][rows])
