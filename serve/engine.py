"""The engine: many requests, one pair, and a host that is never waited for.

A step of the loop takes in what was submitted and cancelled, dispatches a chunk of prompts and some rounds of all that
decode, and only then reads the news of the dispatch before. So the device has always something to do while the host
turns tokens into text; and the host reads from the device once a dispatch, not once a token.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import jax

from dflash_jax.decoding.width import WidthController
from dflash_jax.pair import Pair
from serve import device
from serve.config import EngineConfig, Plan, resolve
from serve.pages import Pages
from serve.prefix import PrefixCache
from serve.programs import Programs
from serve.requests import Event, Handle, Request, Running, prepare
from serve.scheduler import Chunk, Scheduler
from serve.stats import Stats


class Busy(RuntimeError):
    """The queue is full: try again later."""


@dataclass
class Flight:
    """One step's programs on the device, and what their news are about."""

    since: float
    chunks: list[Chunk]
    first: jax.Array | None  # news of the chunks
    rows: list[Running]
    places: list[int]  # rows of the news that they are in
    news: jax.Array | None
    plan: Plan | None  # how the rounds were run


class Engine:
    """Serves requests until it is closed. Use it as a context manager, or call `step` yourself without `start`."""

    def __init__(self, pair: Pair, config: EngineConfig | None = None):
        """Compiles everything. InputError for a configuration that does not fit the pair or the memory."""
        self.pair = pair
        self.config = resolve(pair, config or EngineConfig())
        c = self.config
        self.programs = Programs(pair, c)
        pages = Pages(c.sizes.pages)
        recurrent = c.sizes.checkpoints if self.programs.recurrent else None
        prefix = PrefixCache(pages, c.sizes.page, recurrent) if c.prefix_cache else None
        self.scheduler = Scheduler(c.sizes.slots, c.sizes.page, c.sizes.rounds * c.sizes.width, pages, prefix)
        self.controller = self._make_controller()
        self.controller.fixed = None if c.adaptive else c.widths[-1]
        self.programs.warm_up(self.controller)
        self.stats = Stats()
        self._flights: deque[Flight] = deque()
        self._commands: queue.SimpleQueue[tuple[str, Handle, Running | None]] = queue.SimpleQueue()
        self._requests: dict[Handle, Running] = {}
        self._arrivals = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._error: Exception | None = None
        self._last = 0.0

    def _make_controller(self) -> WidthController:
        return WidthController(self.config.widths)

    # What senders call, from any thread.

    def submit(self, request: Request, deliver: Callable[[Event], None] | None = None) -> Handle:
        """Queue a request. InputError for one that cannot be served, `Busy` while too many wait."""
        if self._closed or self._error is not None:
            raise RuntimeError(f"the engine is closed{f': {self._error}' if self._error else ''}")
        if self.stats.unfinished >= self.config.max_requests:
            raise Busy(f"{self.config.max_requests} requests are here already; try again later")
        handle = Handle(request, self.cancel, deliver)
        with self._lock:
            self._arrivals += 1
            order = self._arrivals
        running = self._prepare(handle, order)
        with self._lock:
            self.stats.submitted += 1
        self._commands.put(("submit", handle, running))
        return handle

    def _prepare(self, handle: Handle, order: int) -> Running:
        return prepare(self.pair, handle, order, self.config.sizes.length, self.config.sizes.settings)

    def cancel(self, handle: Handle) -> None:
        """End a request soon; nothing happens to one that has ended."""
        self._commands.put(("cancel", handle, None))

    @property
    def error(self) -> Exception | None:
        """What has ended the loop, if anything has."""
        return self._error

    def start(self) -> "Engine":
        """Run the loop in a thread of its own."""
        self._thread = threading.Thread(target=self._loop, name="dflash-engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop the loop; requests that are not finished are cancelled."""
        self._closed = True
        self._commands.put(("wake", None, None))  # pyrefly: ignore[bad-argument-type]
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._take_commands(wait=False)
        while self._flights:
            self._collect()
        for running in list(self._requests.values()):
            self._end(running, "cancelled")

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # The loop.

    def _loop(self) -> None:
        try:
            while not self._closed:
                if not self.step():
                    self._take_commands(wait=True)
        except Exception as error:  # whoever waits must hear of it
            self._error = error
            for running in list(self._requests.values()):
                running.done = True
                running.handle.put(error)
            self._requests.clear()
            raise

    def step(self) -> bool:
        """One turn of the loop; False if there was nothing to do."""
        self._take_commands(wait=False)
        flight = self._dispatch()
        if flight is not None:
            self._flights.append(flight)
        if self._flights and (flight is None or len(self._flights) > 1):
            self._collect()
            return True
        return flight is not None

    def _take_commands(self, wait: bool) -> None:
        while wait or not self._commands.empty():
            self._obey(*self._commands.get())
            wait = False

    def _obey(self, kind: str, handle: Handle, running: Running | None) -> None:
        if running is not None:
            self._requests[handle] = running
            self.scheduler.waiting.append(running)
        elif kind == "cancel" and (known := self._requests.get(handle)) is not None:
            self._end(known, "cancelled")

    def _end(self, running: Running, reason: str | None = None) -> None:
        """Free what a request holds, and tell its sender. Programs in flight may still run it: nobody reads them."""
        self.scheduler.leave(running)
        del self._requests[running.handle]
        running.finish(reason)
        with self._lock:
            self.stats.ended(running, cancelled=reason == "cancelled")

    def _dispatch(self) -> Flight | None:
        """The next programs; None if there is nothing to do before the news of those in flight."""
        while (admitted := self.scheduler.admit()) is not None:
            self.programs.admit(*admitted)
            self.stats.admitted(admitted[0])
        now = time.perf_counter()
        flight = Flight(now, [], None, [], [], None, None)
        if (prefill := self.scheduler.chunks(self.config.prefill)) is not None:
            flight.chunks = prefill[1]
            flight.first = self.programs.prefill(*prefill)
        self._dispatch_rounds(flight)
        return flight if flight.chunks or flight.rows else None

    def _dispatch_rounds(self, flight: Flight) -> None:
        rows = [r for r in self.scheduler.running if r.decoding]
        found = None
        while rows and (found := self._reserve(rows)) is None:
            if self._flights or flight.chunks:
                return  # with their news it will be known what is needed
            if self.scheduler.preempt() is not None:
                self.stats.preempted += 1
            rows = [r for r in self.scheduler.running if r.decoding]
        if not rows or found is None:
            return
        plan, deltas = found
        flight.rows, flight.plan = rows, plan
        flight.places, flight.news = self.programs.rounds(rows, deltas, plan)
        for r in rows:
            r.least += 1 if plan.leave else plan.rounds
            r.most += plan.rounds * plan.width
            if not plan.draft and r.cold is None:
                r.cold = len(r.tokens) - 1

    def _reserve(self, rows: list[Running]) -> tuple[Plan, list[tuple[int, int, int]]] | None:
        """A plan with pages for all that may come of it, the new ones as deltas; None: there are too few."""
        first = self._plan(rows)
        for plan in (first, first.of(rounds=1)):
            if (deltas := self.scheduler.reserve(rows, plan.rounds * plan.width)) is not None:
                return plan, deltas
        return None

    def _plan(self, rows: list[Running]) -> Plan:
        """How to run the next rounds of these requests."""
        c = self.config
        bucket = next(b for b in c.buckets if b >= len(rows))
        settings = c.plan_for(r.sampling.plan for r in rows)
        load, filling = (settings, bucket), any(r.waits_for_prefill for r in self.scheduler.running)
        rounds = c.rounds_while_filling if filling else c.sizes.rounds
        share = sum(self._can_draft(r) for r in rows) / len(rows)
        width, trial = self.controller.choose(load, share)
        plain = width == 1 and (share == 0 or self.controller.settled(load))
        draft = self.pair.drafter is not None and len(c.widths) > 1 and not plain
        return Plan(
            bucket, settings, width, draft, min(rounds, 2) if trial else rounds, bool(self.scheduler.waiting), load
        )

    def _can_draft(self, r: Running) -> bool:
        drafter = self.pair.drafter
        if drafter is None or r.cold is not None:
            return False
        longest = drafter.config.max_position
        return not longest or r.most + self.config.sizes.width <= longest

    # News.

    def _collect(self) -> None:
        """Read the news of the oldest flight: the only place where the host waits for the device."""
        flight = self._flights.popleft()
        first, news = jax.device_get((flight.first, flight.news))
        now = time.perf_counter()
        self.stats.host_syncs += 1
        if flight.first is not None:
            for row, chunk in zip(first, flight.chunks, strict=False):
                self.stats.prefill_tokens += chunk.count
                if chunk.kind == device.LAST and not chunk.running.done:
                    self._take_news(chunk.running, *device.news_of(row, 0), expected=(1, 1), plan=None)
        if flight.plan is not None:
            plan, rounds = flight.plan, self.config.sizes.rounds
            taken = [device.news_of(news[place], rounds) for place in flight.places]
            self._learn(flight, [counts for _, counts, _ in taken], now)
            expected = (1 if plan.leave else plan.rounds), plan.rounds * plan.width
            for r, entry in zip(flight.rows, taken, strict=True):
                if not r.done:
                    self._take_news(r, *entry, expected=expected, plan=plan)
        self._last = now

    def _take_news(
        self,
        r: Running,
        tokens: list[int],
        counts: list[int],
        ended: bool,
        *,
        expected: tuple[int, int],
        plan: Plan | None,
    ) -> None:
        """What a request has said; `expected` is how much was thought to be the least and the most."""
        before = len(r.output.tokens)
        r.output.extend(tokens, counts)
        r.least += len(tokens) - expected[0]
        r.most += len(tokens) - expected[1]
        self.stats.tokens += len(r.output.tokens) - before
        if plan is not None and plan.width > 1:
            r.drafted += (plan.width - 1) * len(counts)
            r.accepted += sum(counts) - len(counts)
        if ended or r.output.transcript.stopped:
            self._end(r)
        elif piece := r.output.piece():
            r.handle.put(piece)

    def _learn(self, flight: Flight, counts: list[list[int]], now: float) -> None:
        """Acceptance and cost of the rounds, for the controller and for whoever watches."""
        plan = flight.plan
        assert plan is not None
        drafting = [count for r, row in zip(flight.rows, counts, strict=True) if r.cold is None for count in row]
        done = max(map(len, counts), default=0)
        self.stats.saw_rounds(plan.width, [count for row in counts for count in row], done)
        if plan.width > 1:
            self.controller.observe_counts(plan.width, drafting)
        if flight.first is None and done:
            self.controller.observe_cost(plan.load, plan.width, (now - max(self._last, flight.since)) / done)
