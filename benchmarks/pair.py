"""`make bench`: the embedded pair on its held-out prompts, or any pair on any, speculative against plain decoding.

Both ways run in turns in one process after a warm-up; rates are medians over the runs and count the whole call, prefill
included. Prints a table, or one JSON object with --json; fails where any output differs from plain decoding's.
"""

import dataclasses
import json
import statistics
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from dflash_jax.decoding.width import Width
from dflash_jax.options import option, parser_for, read_options
from serve.bench.options import Measured
from serve.bench.prompts import load_prompts


@dataclasses.dataclass(frozen=True)
class Options(Measured):
    """Speculative against plain decoding, one prompt after the other."""

    count: int = option(20, "how many of the prompts", metavar="N")
    new_tokens: int = option(200, "tokens to generate for each", metavar="N")
    runs: int = option(5, "timed runs of each way", metavar="N")
    width: Width | None = option(
        None, "rows a round; adaptive: what pays; the drafter's block if left out", metavar="W"
    )
    json: bool = option(False, "print one JSON object")


def main() -> int:
    options = read_options(Options, parser_for(Options, "benchmarks.pair", exit_on_error=True).parse_args())
    rows = measure(options)
    total = totals(rows)
    if options.json:
        print(json.dumps({"options": dataclasses.asdict(options), "prompts": rows, "total": total}, indent=1))
    else:
        Console().print(table(rows, total))
    return 0 if total["identical"] else 1


def measure(options: Options) -> list[dict[str, Any]]:
    """One row of figures for each prompt."""
    import dflash_jax
    from dflash_jax.compare import acceptance_length, compare
    from serve.bench.command import with_random_drafter

    pair = dflash_jax.load(options.target, options.drafter)
    if options.random_drafter:
        pair = with_random_drafter(pair)
    rows = []
    for prompt in load_prompts(options.prompts, chat=options.chat, count=options.count):
        result = compare(
            pair,
            prompt,
            runs=options.runs,
            max_seconds=float("inf"),
            max_new_tokens=options.new_tokens,
            width=options.width,
        )
        lengths = result.speculative.acceptance_lengths
        rows.append(
            {
                "prompt": _text(prompt),
                "tokens": len(result.speculative.tokens),
                "rounds": len(lengths),
                "acceptance_length": acceptance_length(lengths),
                "tokens_per_second": result.tokens_per_second,
                "plain_tokens_per_second": result.plain_tokens_per_second,
                "speedup": result.speedup,
                "identical": result.identical,
            }
        )
    return rows


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All prompts as one piece of work: tokens over seconds, committed tokens over rounds."""
    tokens, rounds = sum(row["tokens"] for row in rows), sum(row["rounds"] for row in rows)
    committed = sum(row["acceptance_length"] * row["rounds"] for row in rows)

    def rate(name: str) -> float:
        return tokens / sum(row["tokens"] / row[name] for row in rows)

    return {
        "tokens": tokens,
        "rounds": rounds,
        "acceptance_length": committed / rounds if rounds else 0.0,
        "tokens_per_second": rate("tokens_per_second"),
        "plain_tokens_per_second": rate("plain_tokens_per_second"),
        "speedup": rate("tokens_per_second") / rate("plain_tokens_per_second"),
        "median_speedup": statistics.median(row["speedup"] for row in rows),
        "identical": all(row["identical"] for row in rows),
    }


def table(rows: list[dict[str, Any]], total: dict[str, Any]) -> Table:
    """The figures for a person."""
    out = Table(title="speculative against plain decoding", caption="tokens/s: medians, warm, prefill included")
    for name in ("prompt", "tokens", "acceptance length", "tokens/s", "plain tokens/s", "speed-up", "identical"):
        first = name == "prompt"
        out.add_column(name, justify="left" if first else "right", no_wrap=first, min_width=None if first else 5)
    for row in rows:
        out.add_row(_first_line(row["prompt"]), *_cells(row))
    out.add_section()
    out.add_row("all", *_cells(total), style="bold")
    return out


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _first_line(prompt: str) -> str:
    line = prompt.strip().partition("\n")[0]
    return line if len(line) <= 32 else line[:31] + "…"


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        str(row["tokens"]),
        f"{row['acceptance_length']:.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['plain_tokens_per_second']:.0f}",
        f"{row['speedup']:.2f}x",
        "yes" if row["identical"] else "NO",
    ]


if __name__ == "__main__":
    sys.exit(main())
