"""A plan as tables for a person."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `dflash_jax.plan.plan` found."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items()) or "one device"
    console.print(
        f"{result['program']}: batch {result['batch']}, context {result['context']}, "
        f"{result['rows']} rows a sequence, on {result['topology']} ({result['devices']} devices: {mesh})"
    )
    _memory(result, console)
    _parts(result["roofline"], console)
    if result["compiled"] and "collectives" in result["compiled"]:
        _compiled(result["compiled"], console)
    if speedup := result.get("speedup"):
        console.print(
            f"At {speedup['acceptance_length']:g} tokens a round: {speedup['speedup']:.2f}x plain decoding "
            f"({speedup['plain_seconds'] * 1e3:.2f} ms a token); it pays from {speedup['break_even']:.2f} on. "
            "Computed from the rooflines, not measured."
        )


def size(count: float) -> str:
    """Bytes in words."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def _memory(result: dict[str, Any], console: Console) -> None:
    memory = result["memory"]
    table = _table("Bytes a device", "what", "bytes")
    for name in ("weights", "cache", "temporaries", "total", "hbm"):
        if name in memory:
            table.add_row(name, size(memory[name]))
    console.print(table)
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    console.print(f"{verdict}; {'compiled' if result['compiled'] else 'not compiled: arguments only'}")
    if result["compiled"] and "out_of_memory" in result["compiled"]:
        console.print(result["compiled"]["out_of_memory"], markup=False)


def _parts(roofline: dict[str, Any], console: Console) -> None:
    table = _table("Roofline of a step, a device (computed)", "part", "bytes", "GFLOP", "sent", "us", "share")
    whole: dict[str, Any] = {"name": "all", "share": 1.0} | {
        k: roofline[k] for k in ("bytes", "flops", "sent", "seconds")
    }
    for row in [*roofline["parts"], whole]:
        cells = (size(row["bytes"]), f"{row['flops'] / 1e9:.1f}", size(row["sent"]))
        table.add_row(row["name"], *cells, f"{row['seconds'] * 1e6:.0f}", f"{row['share']:.1%}")
    console.print(table)


def _compiled(compiled: dict[str, Any], console: Console) -> None:
    if compiled["bytes_accessed"]:
        console.print(
            f"Compiled: {compiled['flops'] / 1e9:.1f} GFLOP, {size(compiled['bytes_accessed'])} accessed "
            f"({compiled['roofline_seconds'] * 1e6:.0f} us at the peaks)"
        )
    table = _table("Collectives (compiled)", "kind", "of", "devices", "count", "sent a device")
    for row in compiled["collectives"][:12]:
        table.add_row(row["kind"], row["shape"], str(row["devices"]), str(row["count"]), size(row["sent"]))
    console.print(table)
    table = _table("Largest temporaries (compiled)", "shape", "bytes", "memory", "count", "where")
    for row in compiled["temporaries"][:8]:
        table.add_row(row["shape"], size(row["bytes"]), row["memory"], str(row["count"]), row["source"])
    console.print(table)
    for name, text in (
        ("weight_all_gathers", "all-gathers of weights"),
        ("weight_copies", "copies of weights of at least 1 MiB"),
        ("vocabulary_temporaries", "temporaries of size [rows, vocabulary]"),
    ):
        console.print(f"{text}: {len(compiled[name]) or 'none'}", markup=False)
