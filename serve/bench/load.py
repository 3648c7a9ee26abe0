"""Load on an engine: a fixed number of senders that wait for their answers, or arrivals that wait for nobody."""

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dflash_jax.decoding.output import Generation, Piece
from serve.engine import Engine
from serve.requests import Event, Request


@dataclass
class Trace:
    """What became of one request. Moments are seconds since the run began."""

    submitted: float
    came: list[tuple[float, int]] = field(default_factory=list)  # when tokens came, and how many
    generation: Generation | None = None

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.came[0][0] - self.submitted

    @property
    def per_token(self) -> float | None:
        """Mean seconds a token after those that came first; None where all came at once."""
        after = sum(count for _, count in self.came[1:])
        return (self.came[-1][0] - self.came[0][0]) / after if after else None


@dataclass(frozen=True)
class Traces:
    """A run. Rates count up to `steady`, when the load began to end."""

    requests: list[Trace]
    steady: float

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together."""
        return sum(n for r in self.requests for at, n in r.came if at <= self.steady) / self.steady


@dataclass(frozen=True)
class Load:
    """What an engine is put under; one of the two is given."""

    streams: int = 0
    rate: float = 0.0  # requests a second

    @property
    def name(self) -> str:
        return f"{self.streams} streams" if self.streams else f"{self.rate:g} requests/s"

    def on(self, engine: Engine, requests: Sequence[Request]) -> Traces:
        """A run. The engine's thread has to be there."""
        return closed_loop(engine, requests, self.streams) if self.streams else open_loop(engine, requests, self.rate)


class _Run:
    def __init__(self, engine: Engine):
        self.engine, self.start, self.traces = engine, time.perf_counter(), []
        self.ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def now(self) -> float:
        return time.perf_counter() - self.start

    def send(self, request: Request) -> None:
        trace = Trace(self.now())
        self.traces.append(trace)

        def deliver(event: Event) -> None:
            if isinstance(event, Piece):
                if event.tokens:
                    trace.came.append((self.now(), len(event.tokens)))
                return
            if isinstance(event, Generation):
                trace.generation = event
            self.ended.put(event if isinstance(event, Exception) else None)

        self.engine.submit(request, deliver)

    def wait(self) -> None:
        if (error := self.ended.get()) is not None:
            raise error


def closed_loop(engine: Engine, requests: Sequence[Request], concurrency: int) -> Traces:
    """`concurrency` senders, each with its next request as soon as it has its answer."""
    run = _Run(engine)
    for request in requests[:concurrency]:
        run.send(request)
    for request in requests[concurrency:]:
        run.wait()
        run.send(request)
    run.wait()
    steady = run.now()  # from here on fewer than `concurrency` run
    for _ in range(min(concurrency, len(requests)) - 1):
        run.wait()
    return Traces(run.traces, steady)


def open_loop(engine: Engine, requests: Sequence[Request], rate: float, seed: int = 0) -> Traces:
    """`rate` requests a second on average, arriving as in a Poisson process, whatever becomes of those before."""
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(requests)))
    run = _Run(engine)
    for request, at in zip(requests, arrivals, strict=True):
        time.sleep(max(0.0, float(at) - run.now()))
        run.send(request)
    for _ in requests:
        run.wait()
    return Traces(run.traces, run.now())
