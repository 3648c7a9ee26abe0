"""Speculative and plain decoding of one prompt, timed in one process."""

import dataclasses
import statistics
import time
from typing import Any

import dflash_jax


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One prompt decoded both ways. Rates: generated tokens per second of a whole call, prefill included; medians."""

    speculative: Any  # Generation
    plain: Any  # Generation
    tokens_per_second: float
    plain_tokens_per_second: float

    @property
    def speedup(self) -> float:
        """How many times faster than plain decoding."""
        return self.tokens_per_second / self.plain_tokens_per_second

    @property
    def identical(self) -> bool:
        """Whether both ways gave the same tokens."""
        return self.speculative.tokens == self.plain.tokens


def compare(pair: Any, prompt: Any, *, runs: int = 5, max_seconds: float = 60.0, **options: Any) -> Comparison:
    """Decode `prompt` with and without the drafter, once each to warm up and then `runs` times, in turns.

    Stops repeating after `max_seconds`, but never before one timed run of each. `options` are `dflash_jax.generate`'s.
    """
    start = time.perf_counter()
    ways = {"speculative": True, "plain": False}
    results = {way: _generate(pair, prompt, draft, options) for way, draft in ways.items()}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, draft in ways.items():
            before = time.perf_counter()
            tokens = len(_generate(pair, prompt, draft, options).tokens)
            rates[way].append(tokens / (time.perf_counter() - before))
        if time.perf_counter() - start > max_seconds:
            break
    return Comparison(
        results["speculative"],
        results["plain"],
        statistics.median(rates["speculative"]),
        statistics.median(rates["plain"]),
    )


def acceptance_length(lengths: list[int]) -> float:
    """Mean number of tokens that a round committed, the bonus included; 0 where there was no round."""
    return statistics.fmean(lengths) if lengths else 0.0


def _generate(pair: Any, prompt: Any, draft: bool, options: dict[str, Any]) -> Any:
    # A drafter's width means nothing to plain decoding.
    kept = options if draft else {name: value for name, value in options.items() if name != "width"}
    return dflash_jax.generate(pair, [prompt], draft=draft, **kept)[0]
