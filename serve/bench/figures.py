"""From what became of requests to the figures of a table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serve.bench.load import Trace, Traces


@dataclass(frozen=True)
class Figures:
    """One load and one way of decoding. Times in seconds; the rate is the median of the runs, times are of all."""

    load: str  # as "16 streams" or "2 requests/s"
    way: str  # plain, adaptive, or a width
    tokens_per_second: float
    first_token_p50: float
    first_token_p99: float
    per_token_p50: float
    per_token_p99: float
    acceptance_length: float  # tokens a round, the target's own included
    speedup: float | None  # over plain decoding under the same load: the median over the runs; None without it
    identical: int  # requests whose tokens are those of the first way
    requests: int  # of one run


def figures(load: str, runs: dict[str, list[Traces]]) -> list[Figures]:
    """The figures of one load, from the runs of each way of decoding; run i of all ways came one after the other."""
    first, plain = next(iter(runs.values())), runs.get("plain")
    return [_of_way(load, way, own, first, plain) for way, own in runs.items()]


def _of_way(
    load: str, way: str, runs: Sequence[Traces], first: Sequence[Traces], plain: Sequence[Traces] | None
) -> Figures:
    traces = [trace for run in runs for trace in run.requests]
    starts = [trace.first for trace in traces if trace.came]
    each = [seconds for trace in traces if (seconds := trace.per_token) is not None]
    lengths = [n for trace in traces if trace.generation for n in trace.generation.acceptance_lengths]
    ratios = (
        None if plain is None else [a.tokens_per_second / b.tokens_per_second for a, b in zip(runs, plain, strict=True)]
    )
    return Figures(
        load, way, statistics.median(run.tokens_per_second for run in runs),
        *_percentiles(starts), *_percentiles(each),
        statistics.fmean(lengths) if lengths else 1.0,
        None if ratios is None else statistics.median(ratios),
        sum(_tokens(a) == _tokens(b) for a, b in zip(runs[0].requests, first[0].requests, strict=True)),
        len(runs[0].requests),
    )  # fmt: skip


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    return tuple(np.percentile(values, (50, 99)).tolist()) if values else (float("nan"),) * 2  # pyrefly: ignore


def _tokens(trace: Trace) -> list[int] | None:
    return None if trace.generation is None else trace.generation.tokens
