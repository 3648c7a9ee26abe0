"""Every kernel at real sizes on the accelerator that is here: against its reference, and timed.

A case runs in a loop on the device; its time is the difference between many and few turns, divided by the turns
between them, so that launching the program and copying its arguments once do not count. Both implementations are timed
alike. `python -m benchmarks.kernels --kernel gated_delta --case 'batch 32'`; fails where a result is wrong.
"""

import dataclasses
import importlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.aot import kernels
from dflash_jax.options import option, parser_for, read_options
from dflash_jax.topology import CHIPS, KINDS, Chip
from pallas_kernels.case import Case

FEW, MANY = 2, 12  # turns
LARGEST_REFERENCE = 4 * 2**30  # bytes a case may move and still be compared: references hold more than that


@dataclasses.dataclass(frozen=True)
class Options:
    """Run and time kernels at real sizes on the accelerator that is here."""

    kernel: tuple[str, ...] = option((), "only this one; may be repeated", metavar="NAME")
    case: str = option("", "only cases whose names match this expression", metavar="REGEX")
    runs: int = option(5, "timed runs of each", metavar="N")
    json: bool = option(False, "print one JSON object a case, as it is found")


def main() -> int:
    options = read_options(Options, parser_for(Options, "benchmarks.kernels", exit_on_error=True).parse_args())
    if (platform := jax.default_backend()) not in ("gpu", "tpu"):
        print(f"benchmarks.kernels: there is no accelerator here, only {platform}; `make aot` compiles for one")
        return 2
    rows = []
    for row in measure(options, platform):
        rows.append(row)
        if options.json:
            print(json.dumps(row), flush=True)
    if not options.json:
        Console().print(table(rows))
    return 1 if any(row["failure"] for row in rows) else 0


def measure(options: Options, platform: Any) -> Iterator[dict[str, Any]]:
    """A row for each case that is a kernel on this platform."""
    device = jax.devices()[0]
    chip = CHIPS.get(KINDS.get(device.device_kind, ""))
    for kernel in options.kernel or kernels():
        for case in importlib.import_module(f"pallas_kernels.{kernel}.cases").cases():
            if re.search(options.case, case.name) and is_kernel(case, platform):
                yield {"kernel": kernel, "device": device.device_kind, **run(case, platform, chip, options.runs)}


def is_kernel(case: Case, platform: Any) -> bool:
    """Whether a kernel takes the case on this platform, and not the reference."""
    try:
        jax.eval_shape(case.call(platform), *case.arguments)
    except ValueError as refusal:
        if "does not take these shapes" not in str(refusal):
            raise
        return False
    return True


def run(case: Case, platform: Any, chip: Chip | None, runs: int) -> dict[str, Any]:
    """Error and microseconds of one case."""
    row: dict[str, Any] = {"case": case.name, "failure": "", "error": None, "us": None, "reference_us": None}
    if chip is not None:
        row["least_us"] = 1e6 * max(case.must_move / chip.hbm_bandwidth, case.flops / chip.flops) * chip.devices
    try:
        arrays = filled(case)
        if case.must_move <= LARGEST_REFERENCE:
            row["error"] = error(case, platform, arrays)
            row["reference_us"] = microseconds(case.call("reference"), arrays, runs)
        row["us"] = microseconds(case.call(platform), arrays, runs)
    except Exception as failure:  # the compilers raise what they like
        row["failure"] = str(failure).strip().partition("\n")[0][:200]
        return row
    if row["error"] is not None and not row["error"] < 0.02:  # bfloat16 outputs
        row["failure"] = "differs from the reference"
    return row


def filled(case: Case) -> tuple[Any, ...]:
    """Arguments: the case's whole numbers, random bits, and normal numbers (vectors: small positive ones)."""
    leaves, tree = jax.tree.flatten(case.arguments)
    whole, keys = iter(case.whole), jax.random.split(jax.random.key(0), len(leaves))

    @partial(jax.jit, static_argnums=(1, 2))
    def fill(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if dtype == jnp.uint32:
            return jax.random.bits(key, shape, dtype)
        drawn = jax.random.normal(key, shape, dtype)
        return drawn if len(shape) > 1 else jnp.abs(drawn) / 10

    def one(key: jax.Array, x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(next(whole), x.dtype) if x.dtype == jnp.int32 else fill(key, x.shape, x.dtype)

    return jax.tree.unflatten(tree, [one(key, x) for key, x in zip(keys, leaves, strict=True)])


def error(case: Case, platform: Any, arrays: tuple[Any, ...]) -> float:
    """The largest of the outputs' distances from the reference, each relative to the reference's size."""
    found, wanted = (jax.jit(case.call(name))(*arrays) for name in (platform, "reference"))

    @jax.jit
    def distance(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.linalg.norm((x - y).ravel()) / jnp.maximum(jnp.linalg.norm(y.ravel()), 1e-30)

    return max(float(distance(x, y)) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))


def microseconds(call: Callable[..., Any], arrays: tuple[Any, ...], runs: int) -> float:
    """The median time of one call within a loop on the device."""

    @jax.jit
    def loop(turns: jax.Array, arrays: tuple[Any, ...]) -> Any:
        def turn(i: jax.Array, carry: Any) -> Any:
            # Barriers: nothing may be moved out of the loop, nor may an output be computed in part.
            arrays, i = jax.lax.optimization_barrier((carry[0], i))
            out = jax.lax.optimization_barrier(call(*arrays))
            # What is updated in place goes on from turn to turn, or it would be copied in each.
            given = {(x.shape, x.dtype): x for x in jax.tree.leaves(out)}
            kept = jax.tree.map(lambda x: given.get((x.shape, x.dtype), x) if x.size > 2**22 else x, arrays)
            return kept, sum(jnp.sum(x.ravel()[:1].astype(jnp.float32)) for x in jax.tree.leaves(out))

        return jax.lax.fori_loop(0, turns, turn, (arrays, jnp.float32(0)))[1]

    compiled = loop.lower(jnp.int32(0), arrays).compile()

    def seconds(turns: int) -> float:
        count = jnp.int32(turns)
        start = time.perf_counter()
        jax.block_until_ready(compiled(count, arrays))
        return time.perf_counter() - start

    seconds(FEW)
    found = [(seconds(MANY) - seconds(FEW)) / (MANY - FEW) for _ in range(runs)]
    return 1e6 * statistics.median(found)


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for a person."""
    out = Table(title=f"kernels on {rows[0]['device']}" if rows else "no case matches")
    for name in ("case", "us", "least us", "reference us", "error"):
        out.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        figures = [row.get(name) for name in ("us", "least_us", "reference_us")]
        last = row["failure"] or ("-" if row["error"] is None else f"{row['error']:.1e}")
        out.add_row(row["case"], *("-" if x is None else f"{x:.1f}" for x in figures), last)
    return out


if __name__ == "__main__":
    sys.exit(main())
