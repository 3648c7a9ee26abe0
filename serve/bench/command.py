"""`dflash bench serve`: one engine under load, decoding plainly and speculatively in turns."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dflash_jax import pair as pairs
from dflash_jax.errors import InputError
from dflash_jax.options import numbers
from dflash_jax.pair import Pair
from serve.bench.figures import Figures, figures
from serve.bench.load import Load, Traces
from serve.bench.options import BenchOptions
from serve.bench.prompts import load_prompts
from serve.bench.report import plot, require_plots, table
from serve.config import FILTERED, GREEDY, EngineConfig, resolve
from serve.engine import Engine
from serve.requests import Request


def bench(options: BenchOptions) -> int:
    """Measure, and print a table or a JSON object. The exit status is 1 where greedy outputs differ."""
    from rich.console import Console

    loads = [Load(streams=n) for n in numbers(options.concurrency, "concurrency", int)]
    loads += [Load(rate=r) for r in numbers(options.rates, "rates", float)]
    if not loads:
        raise InputError("there is no load; give --concurrency 1,4,16 or --rates 2,8")
    if options.requests < 1 or options.runs < 1:
        raise InputError(f"requests are {options.requests} and runs {options.runs}; give at least 1 of each")
    if options.plot:
        require_plots()
    prompts = load_prompts(options.prompts, chat=options.chat)

    def check(outline: Pair) -> None:
        if options.random_drafter:
            require_drafter(outline)
        check_ways(resolve(outline, engine_config(options, outline)).widths, options.ways)

    pair = pairs.load(options.target, options.drafter, check=check)
    if options.random_drafter:
        pair = with_random_drafter(pair)
    with Console(stderr=True).status("compiling"):
        engine = Engine(pair, engine_config(options, pair))
    ways = check_ways(engine.config.widths, options.ways)
    with engine:
        rows = list(measure(engine, prompts, loads, ways, options))
    if options.plot:
        plot(rows, Path(options.plot))
    if options.json:
        listed = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"options": dataclasses.asdict(options), "figures": listed}))
    else:
        Console().print(table(rows, f"{options.max_new_tokens} new tokens a request, {options.runs} runs of each way"))
    same = all(row.identical == row.requests for row in rows)
    if not same and not options.temperature:
        print("dflash: outputs differ between ways of decoding", file=sys.stderr)
    return 0 if same or options.temperature else 1


def engine_config(options: BenchOptions, pair: Pair) -> EngineConfig:
    """Return the sizes of the engine that is measured."""
    return EngineConfig(
        slots=options.slots, prefix_cache=options.prefix_cache, plans=(GREEDY, FILTERED),
        max_length=min(options.max_length, pair.target.config.max_position or options.max_length),
    )  # fmt: skip


def check_ways(compiled: Sequence[int], text: str) -> dict[str, int | None]:
    """Each way of decoding and its width, None for any. InputError for a way that the engine has not compiled."""
    ways: dict[str, int | None] = {}
    for way in text.split(","):
        width = 1 if way == "plain" else int(way) if re.fullmatch("[1-9][0-9]*", way) else None
        if way != "adaptive" and width not in compiled:
            widths = ", ".join(map(str, compiled))
            raise InputError(f"a way of decoding is {way!r}; give plain, adaptive or a compiled width: {widths}")
        ways[way] = width
    return ways


def measure(
    engine: Engine,
    prompts: Sequence[Any],
    loads: Sequence[Load],
    ways: dict[str, int | None],
    options: BenchOptions,
) -> Iterator[Figures]:
    """The figures of every load and way. The ways take turns, each first once for a short time to warm up."""
    most = engine.config.sizes.length - options.max_new_tokens
    asked = Request(prompts[0], options.max_new_tokens, temperature=options.temperature)
    requests = [replace(asked, prompt=p, seed=i) for i, p in enumerate(_fitting(engine.pair, prompts, most))]
    for load in loads:
        listed = [requests[i % len(requests)] for i in range(options.requests * (load.streams or 1))]
        runs: dict[str, list[Traces]] = {way: [] for way in ways}
        for turn in range(options.runs + 1):
            for way, width in ways.items():
                engine.controller.fixed = width
                traces = load.on(engine, listed if turn else listed[: load.streams or 4])
                if turn:
                    runs[way].append(traces)
        yield from figures(load.name, runs)


def _fitting(pair: Pair, prompts: Sequence[Any], most: int) -> list[Any]:
    fitting = [p for p in prompts if len(pair.tokenizer.encode(p)) <= most]
    if not fitting:
        raise InputError(f"no prompt has at most {most} tokens; give a larger --max-length or fewer --max-new-tokens")
    return fitting


def require_drafter(pair: Pair) -> None:
    """InputError for a pair without a drafter."""
    if pair.drafter is None:
        raise InputError("there is no drafter to make random; give --drafter too")


def with_random_drafter(pair: Pair) -> Pair:
    """The pair with noise for the drafter's matrices: what speculation costs where it is of no use."""
    import jax
    from flax import nnx

    require_drafter(pair)
    graph, weights = nnx.split(pair.drafter)
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = [
        x if x.ndim < 2 else jax.random.normal(key, x.shape, x.dtype) / x.shape[-2] ** 0.5
        for key, x in zip(keys, leaves, strict=True)
    ]
    return replace(pair, drafter=nnx.merge(graph, jax.tree.unflatten(tree, noise)))
