"""`python -m benchmarks.soak`: many short requests, then random load with cancels, on one engine.

Every output is compared with what `generate` gives the same request (a cancelled one with its beginning); but where a
selector drafts and the temperature is above 0, only its length is, as what is drawn depends on the rounds' widths.
After all of it the engine must hold no page, no slot and no request; and the process no more threads, file handles or
(but for 2%) memory than it had after a warm-up. Linux.
"""

import dataclasses
import gc
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dflash_jax.decoding.generate import generate
from dflash_jax.decoding.output import Generation, Piece
from dflash_jax.options import option, parser_for, read_options
from dflash_jax.pair import Pair, load
from serve.config import EngineConfig
from serve.engine import Engine
from serve.requests import Event, Handle, Request

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 4},
    {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2, "seed": 5},
    {"repetition_penalty": 1.1, "frequency_penalty": 0.5},
)
SHOWN = 5  # problems
GROWTH = 0.02  # of resident memory, after the warm-up


@dataclass(frozen=True)
class Case:
    """A request and its whole output, which may be another one where it is not `exact`."""

    request: Request
    tokens: list[int]
    exact: bool


@dataclass(frozen=True)
class Resources:
    """What a process holds."""

    threads: int
    handles: int
    memory: int  # resident bytes

    @classmethod
    def now(cls) -> "Resources":
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(threading.active_count(), len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE"))


@dataclass
class Report:
    """What was seen. `problems` is empty if all was well."""

    finished: int = 0
    cancelled: int = 0
    tokens: int = 0
    seconds: float = 0.0
    preempted: int = 0
    before: Resources | None = None  # after the warm-up
    after: Resources | None = None
    problems: list[str] = dataclasses.field(default_factory=list)


def cases(pair: Pair, count: int, new_tokens: int, longest: int, kinds: Sequence[dict[str, Any]] = KINDS) -> list[Case]:
    """Requests of all kinds of settings, with prompts of 1 to `longest` tokens, some of which begin alike."""
    rng, vocab = np.random.default_rng(0), pair.target.config.vocab_size
    starts = [rng.integers(2, vocab, longest // 2).tolist() for _ in range(3)]
    prompts = [rng.integers(2, vocab, rng.integers(1, longest // 2 + 1)).tolist() for _ in range(count)]
    prompts = [starts[i % 3] + p if i % 4 == 0 else p for i, p in enumerate(prompts)]
    found, selects = [], pair.drafter is not None and pair.drafter.selector is not None
    for kind, settings in enumerate(kinds):
        own, exact = prompts[kind :: len(kinds)], not (selects and settings.get("temperature"))
        for prompt, result in zip(own, generate(pair, own, max_new_tokens=new_tokens, **settings), strict=True):
            found.append(Case(Request(prompt, new_tokens, **settings), result.tokens, exact))
    return found


class Soak:
    """Random load on an engine whose thread runs, with every answer checked."""

    def __init__(self, engine: Engine, cases: list[Case], seed: int = 0):
        self.engine, self.cases, self.report = engine, cases, Report()
        self._rng = np.random.default_rng(seed)
        self._ended: queue.SimpleQueue[tuple[int, Generation | Exception]] = queue.SimpleQueue()
        self._live: dict[int, tuple[Handle, Case]] = {}
        self._sent = 0

    def run(self, more: Callable[[int], bool], *, ahead: int, longest: int, cancels: float = 0.0) -> None:
        """Send while `more(requests sent)` holds, up to `ahead` at once, outputs of up to `longest` tokens."""
        first, start = self._sent, time.perf_counter()
        while (sending := more(self._sent - first)) or self._live:
            if sending and len(self._live) < self._rng.integers(1, ahead + 1):
                self._send(longest)
            else:
                self._check(*self._ended.get())
            if self._live and self._rng.random() < cancels:
                handle, _ = self._live[int(self._rng.choice(list(self._live)))]
                handle.cancel()
        self.report.seconds += time.perf_counter() - start

    def _send(self, longest: int) -> None:
        case = self.cases[self._rng.integers(len(self.cases))]
        new, key = int(self._rng.integers(1, longest + 1)), self._sent
        self._sent += 1

        def deliver(event: Event) -> None:
            if not isinstance(event, Piece):
                self._ended.put((key, event))

        handle = self.engine.submit(dataclasses.replace(case.request, max_new_tokens=new), deliver)
        self._live[key] = handle, case

    def _check(self, key: int, end: Generation | Exception) -> None:
        handle, case = self._live.pop(key)
        new, report = handle.request.max_new_tokens, self.report
        expected = case.tokens[:new]
        if isinstance(end, Exception):
            raise end
        report.tokens += len(end.tokens)
        cancelled = end.finish_reason == "cancelled"
        report.cancelled += cancelled
        report.finished += not cancelled
        wrong = end.tokens != (expected[: len(end.tokens)] if cancelled else expected)
        if not case.exact:
            wrong = len(end.tokens) > new or (end.finish_reason == "length" and len(end.tokens) < new)
        if wrong:
            report.problems.append(f"request {key} gave {end.tokens}, not {expected}")

    def warm(self) -> None:
        """What is held from here on is what may be held."""
        self.report.before = Resources.now()

    def done(self) -> Report:
        """The report, with what is held and should not be."""
        report, before, after = self.report, self.report.before, Resources.now()
        assert before is not None
        report.after, report.preempted = after, self.engine.stats.preempted
        report.problems += held(self.engine)
        if after.threads > before.threads or after.handles > before.handles:
            report.problems.append(f"threads and handles grew from {before} to {after}")
        if after.memory > (1 + GROWTH) * before.memory:
            report.problems.append(f"memory grew by {after.memory / before.memory - 1:.1%}")
        return report


def held(engine: Engine) -> list[str]:
    """What an engine without requests holds and should not, in words."""
    scheduler, problems = engine.scheduler, []
    pages, prefix = scheduler.pages, scheduler.prefix
    try:
        pages.check(scheduler.held(), [] if prefix is None else [node.page for node in prefix.nodes()])
    except AssertionError as error:
        problems.append(f"pages: {error}")
    if taken := [str(slot) for slot, running in enumerate(scheduler.slots) if running is not None]:
        problems.append(f"slots are taken: {', '.join(taken)}")
    if engine.stats.unfinished or scheduler.waiting:
        problems.append(f"{max(engine.stats.unfinished, len(scheduler.waiting))} requests have not ended")
    if pages.free + pages.idle != pages.count:
        problems.append(f"{pages.count - pages.free - pages.idle} pages are held by nobody")
    return problems


@dataclass(frozen=True)
class Options:
    """Short requests, then random load with cancels; all outputs checked, and that nothing leaks."""

    target: str | None = option(None, "checkpoint folder or hub name; the embedded pair if left out", metavar="DIR")
    drafter: str | None = option(None, "DFlash drafter made for the target", metavar="DIR")
    requests: int = option(10_000, "short requests", metavar="N")
    minutes: float = option(30.0, "minutes of random load", metavar="M")
    json: bool = option(False, "print one JSON object")


def main() -> int:
    options = read_options(Options, parser_for(Options, "benchmarks.soak", exit_on_error=True).parse_args())
    pair = load(options.target, options.drafter)
    pool = cases(pair, 64, new_tokens=160, longest=96)
    # Fewer pages than 16 of the longest need.
    with Engine(pair, EngineConfig(max_length=384, pages=64)) as engine:
        soak = Soak(engine, pool)
        soak.run(lambda sent: sent < options.requests // 10, ahead=48, longest=16)
        soak.run(lambda sent: sent < 64, ahead=48, longest=160, cancels=0.1)
        soak.warm()
        soak.run(lambda sent: sent < options.requests, ahead=48, longest=16)
        end = time.monotonic() + 60 * options.minutes
        soak.run(lambda sent: time.monotonic() < end, ahead=48, longest=160, cancels=0.1)
        report = soak.done()
    facts = dataclasses.asdict(report)
    if options.json:
        print(json.dumps(facts))
    else:
        for name, value in (facts | {"problems": report.problems[:SHOWN]}).items():
            print(f"{name}: {value}")
        if len(report.problems) > SHOWN:
            print(f"and {len(report.problems) - SHOWN} problems more")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
