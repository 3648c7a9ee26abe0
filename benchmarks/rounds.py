"""Rounds of a real model with random weights on the device that is here: what a row costs, without a checkpoint.

Plain decoding and rounds of several widths run the library's own loop from a context that is already cached. Random
drafts are hardly ever right, so what counts is the time of a round: over that of a plain one it is the acceptance
length from which on speculation pays.

    python -m benchmarks.rounds --target docs/configs/qwen3-8b.json --recipe train/recipes/qwen3-8b-dflash.yaml
"""

import dataclasses
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx
from rich.console import Console
from rich.table import Table

from dflash_jax.abstract import build, empty_state, read_config
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.decoding.round import DecodeState
from dflash_jax.decoding.run import rounds_for
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target
from dflash_jax.options import numbers, option, parser_for, read_options
from dflash_jax.roofline import roofline, seconds
from dflash_jax.sharding import make_mesh
from dflash_jax.topology import CHIPS, KINDS, parse_topology
from train.architecture import DrafterArchitecture

FEW, MANY = 4, 20  # rounds


@dataclasses.dataclass(frozen=True)
class Options:
    """Time rounds of a model with random weights on the device that is here."""

    target: str = option("docs/configs/qwen3-8b.json", "config.json of the target", metavar="FILE")
    recipe: str = option("train/recipes/qwen3-8b-dflash.yaml", "recipe that describes the drafter", metavar="FILE")
    layers: int | None = option(None, "only the first so many layers of the target", metavar="N")
    batches: str = option("1", "sequences at once", metavar="B,B")
    widths: str = option("1,16", "rows a round; 1 is plain decoding", metavar="W,W")
    context: int = option(1024, "tokens in the cache", metavar="N")
    runs: int = option(5, "timed runs", metavar="N")
    json: bool = option(False, "print one JSON object")


def main() -> int:
    options = read_options(Options, parser_for(Options, "benchmarks.rounds", exit_on_error=True).parse_args())
    try:
        rows = measure(options)
    except InputError as error:
        print(f"benchmarks.rounds: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"options": dataclasses.asdict(options), "rows": rows}))
    else:
        Console().print(table(rows))
    return 0


def configurations(options: Options) -> tuple[TargetConfig, DrafterConfig]:
    """Of the target, cut if asked for, and of the recipe's drafter, whose taps move into what is left of the target."""
    target = TargetConfig.from_dict(read_config(options.target))
    recipe = yaml.safe_load(Path(options.recipe).read_text())
    sizes = recipe["training"]["architecture"]
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    architecture = DrafterArchitecture(**given)
    drafter = architecture.drafter_config(target, recipe.get("mask_token", target.vocab_size - 1))
    if options.layers is None:
        return target, drafter
    left = options.layers / target.num_layers
    taps = sorted({int(tap * left) for tap in drafter.tap_ids})
    missing = [tap for tap in range(options.layers) if tap not in taps][: len(drafter.tap_ids) - len(taps)]
    cut = dataclasses.replace(target, layer_types=target.layer_types[: options.layers])
    return cut, dataclasses.replace(drafter, tap_ids=tuple(sorted([*taps, *missing])))


def measure(options: Options) -> list[dict[str, Any]]:
    """A row for each batch and width."""
    target, drafter = configurations(options)
    graph, weights = random_weights(target, drafter)
    (target_graph, target_weights) = random_view(graph, weights)
    kind = jax.devices()[0].device_kind
    rows = []
    for batch in numbers(options.batches, "batches", int):
        plain = None
        for width in numbers(options.widths, "widths", int):
            given = (target_graph, target_weights) if width == 1 else (graph, weights)
            found = one_round(
                *given, target, drafter if width > 1 else None, batch, options.context, width, options.runs
            )
            plain = found if width == 1 else plain
            least = least_seconds(kind, target, drafter, batch, options.context, width)
            row = {"device": kind, "layers": target.num_layers, "batch": batch, "width": width, "seconds": found}
            rows.append(row | {"least_seconds": least, "over_plain": None if plain is None else found / plain})
    return rows


def random_weights(target: TargetConfig, drafter: DrafterConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Both models in bfloat16, made on the device one parameter after the other: at once they would not fit twice."""
    half = jnp.bfloat16
    models = shapes_of(lambda rngs: (Target(target, dtype=half, rngs=rngs), Drafter(drafter, dtype=half, rngs=rngs)))
    graph, shapes = nnx.split(models)

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * 0.02

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [
        jnp.ones(x.shape, x.dtype) if x.ndim == 1 else draw(key, x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return graph, jax.tree.unflatten(tree, made)


def random_view(graph: nnx.GraphDef, weights: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """The target without its drafter, on the same arrays."""
    return nnx.split((nnx.merge(graph, weights)[0], None))


def one_round(
    graph: nnx.GraphDef, weights: nnx.State, target: TargetConfig, drafter: DrafterConfig | None, batch: int,
    context: int, width: int, runs: int,
) -> float:  # fmt: skip
    """The median seconds of a round: many rounds less few, over the rounds between them."""

    @jax.jit
    def state() -> DecodeState:
        empty = empty_state(target, drafter, batch, context + (MANY + 1) * width, width)
        tokens = jax.random.randint(jax.random.key(1), empty.tokens.shape, 0, target.vocab_size - 1)
        lengths = jnp.full(batch, context, jnp.int32)
        return dataclasses.replace(
            empty,
            cache=dataclasses.replace(empty.cache, lengths=lengths - 1),
            tokens=tokens,
            known=lengths,
            start=lengths,
            limit=jnp.full(batch, empty.tokens.shape[1], jnp.int32),
            stops=jnp.full_like(empty.stops, -1),
        )

    def timed(rounds: int) -> float:
        given = jax.block_until_ready(state())
        count = jax.device_put(np.int32(rounds))
        start = time.perf_counter()
        jax.block_until_ready(rounds_for(batch)(graph, weights, given, None, count, width))
        return time.perf_counter() - start

    timed(FEW)
    return statistics.median((timed(MANY) - timed(FEW)) / (MANY - FEW) for _ in range(runs))


def least_seconds(
    kind: str, target: TargetConfig, drafter: DrafterConfig, batch: int, context: int, width: int
) -> float | None:
    """By the device's published peaks; None where they are not known."""
    if kind not in KINDS:
        return None
    topology = parse_topology(f"{KINDS[kind]}:1" if CHIPS[KINDS[kind]].dimensions == 1 else f"{KINDS[kind]}:1x1")
    used = drafter if width > 1 else None
    program = build(target, used, make_mesh(jax.devices()[:1]), "round" if used else "plain", batch, context, width)
    return seconds(roofline(target, used, program, width), topology)


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for a person."""
    out = Table(title=f"rounds on {rows[0]['device']}, {rows[0]['layers']} layers")
    for name in ("batch", "rows", "ms a round", "least ms", "over plain"):
        out.add_column(name, justify="right")
    for row in rows:
        least, over = row["least_seconds"], row["over_plain"]
        out.add_row(
            str(row["batch"]),
            str(row["width"]),
            f"{1e3 * row['seconds']:.2f}",
            "-" if least is None else f"{1e3 * least:.2f}",
            "-" if over is None else f"{over:.2f}x",
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
