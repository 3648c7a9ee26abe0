"""Against PyTorch on the same machine, the same weights and the same output. Needs the `test` extra.

1. Plain decoding of the embedded target against `generate` of transformers.
2. The speculative loop against the PyTorch loop in reference_torch.py, on random pairs with the golden cases'
   architectures.

PyTorch uses one or two threads, whichever a trial of each shows to be faster (small models often do better with one).
Both sides are warmed up, take turns, and count the whole call; rates are medians. Fails where outputs differ.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

import dflash_jax
from benchmarks.random_pair import CASES, write_pair
from benchmarks.reference_torch import Reference
from dflash_jax.options import option, parser_for, read_options
from serve.bench.prompts import load_prompts

THREADS = (1, 2)


@dataclasses.dataclass(frozen=True)
class Options:
    """This project against PyTorch: plain decoding of the embedded target, and the DFlash loop on random pairs."""

    prompts: int = option(3, "held-out prompts for the embedded target", metavar="N")
    new_tokens: int = option(200, "tokens to generate for each", metavar="N")
    hidden_size: int = option(256, "width of the random pairs, a multiple of 64", metavar="D")
    runs: int = option(5, "timed runs of each side", metavar="N")
    json: bool = option(False, "print one JSON object")


def main() -> int:
    options = read_options(Options, parser_for(Options, "benchmarks.baselines", exit_on_error=True).parse_args())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = plain_rows(options) + loop_rows(options)
    if options.json:
        print(json.dumps({"options": dataclasses.asdict(options), "rows": rows}, indent=1))
    else:
        Console().print(table(rows))
    return 0 if all(row["identical"] for row in rows) else 1


def plain_rows(options: Options) -> list[dict[str, Any]]:
    """Plain decoding of the embedded target, ours and that of transformers."""
    pair = dflash_jax.load()
    folder = Path(dflash_jax.__file__).parent / "embedded" / "target"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for i, prompt in enumerate(load_prompts(None, count=options.prompts)):
        ids = pair.tokenizer.encode(prompt)

        def ours(ids: list[int] = ids) -> list[int]:
            return dflash_jax.generate(pair, [ids], max_new_tokens=options.new_tokens, draft=False)[0].tokens

        def theirs(ids: list[int] = ids) -> list[int]:
            with torch.inference_mode():
                out = model.generate(torch.tensor([ids]), max_new_tokens=options.new_tokens, do_sample=False)
            return out[0, len(ids) :].tolist()

        rows.append({"what": f"plain decoding, prompt {i + 1}", **race(ours, theirs, options.runs)})
    return rows


def loop_rows(options: Options) -> list[dict[str, Any]]:
    """The speculative loop, ours and PyTorch's, on one random pair for each golden case."""
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            target, drafter = write_pair(case, Path(folder), options.hidden_size)
            pair, reference = dflash_jax.load(str(target), str(drafter)), Reference(target, drafter)
        vocab = reference.target.config.vocab_size
        prompt = np.random.default_rng(0).integers(0, vocab - 1, 11).tolist()

        def ours(pair: Any = pair, prompt: list[int] = prompt) -> list[int]:
            return dflash_jax.generate(pair, [prompt], max_new_tokens=options.new_tokens)[0].tokens

        def theirs(reference: Reference = reference, prompt: list[int] = prompt) -> list[int]:
            return reference.generate(prompt, options.new_tokens).tokens

        lengths = reference.generate(prompt, options.new_tokens).acceptance_lengths
        name = f"DFlash loop, {case}, acceptance length {statistics.fmean(lengths):.2f}"
        rows.append({"what": name, **race(ours, theirs, options.runs)})
    return rows


def race(ours: Callable[[], list[int]], theirs: Callable[[], list[int]], runs: int) -> dict[str, Any]:
    """Tokens per second of both sides; theirs with the number of threads that suits it best."""
    tokens, expected = ours(), theirs()
    threads = max(THREADS, key=lambda threads: _torch_rate(theirs, threads))
    rates = [(_rate(ours), _torch_rate(theirs, threads)) for _ in range(runs)]
    our_rate, their_rate = (statistics.median(side) for side in zip(*rates, strict=True))
    return {
        "tokens": len(tokens),
        "tokens_per_second": our_rate,
        "torch_tokens_per_second": their_rate,
        "torch_threads": threads,
        "ratio": our_rate / their_rate,
        "identical": tokens == expected,
    }


def _torch_rate(run: Callable[[], list[int]], threads: int) -> float:
    torch.set_num_threads(threads)
    return _rate(run)


def _rate(run: Callable[[], list[int]]) -> float:
    start = time.perf_counter()
    return len(run()) / (time.perf_counter() - start)


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for a person."""
    out = Table(title="against PyTorch, CPU, float32", caption="tokens/s: medians, warm, prefill included")
    for name in ("what", "tokens", "tokens/s", "torch tokens/s (threads)", "ratio", "identical"):
        out.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        out.add_row(
            row["what"],
            str(row["tokens"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['torch_tokens_per_second']:.0f} ({row['torch_threads']})",
            f"{row['ratio']:.2f}x",
            "yes" if row["identical"] else "NO",
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
