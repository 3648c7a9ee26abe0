"""The engine: many requests, one pair, and a host that is never waited for.

A step of the loop takes in what was submitted and cancelled, dispatches a chunk of prompts, or some rounds of all that
decode, or both, and only then reads the news of the dispatch before. So the device has always something to do while the
host turns tokens into text; and the host reads from the device once a dispatch, not once a token. Only requests with a
grammar need the host in every round.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dflash_jax.decoding.width import WidthController
from dflash_jax.pair import Pair
from serve.collect import Collector
from serve.config import EngineConfig, resolve
from serve.dispatch import Dispatcher, Flight
from serve.grammar import Grammars
from serve.pages import Pages
from serve.prefix import PrefixCache
from serve.prepare import prepare
from serve.programs import Programs
from serve.requests import Event, Handle, Request, Running
from serve.scheduler import Scheduler
from serve.stats import Stats
from serve.warmup import Progress, unseen, warm_up


class Busy(RuntimeError):
    """The queue is full: try again later."""


@dataclass(frozen=True)
class Command:
    """From a sender's thread to the loop: a new request, one to cancel, or nothing, which wakes the loop."""

    running: Running | None = None
    cancel: Handle | None = None


class Engine:
    """Serves requests until it is closed. Use it as a context manager, or call `step` yourself without `start`."""

    def __init__(self, pair: Pair, config: EngineConfig | None = None, progress: Progress = unseen):
        """Compiles everything, see `warm_up`. InputError for a configuration that does not fit pair or memory."""
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
        warm_up(self.programs, self.controller, progress)
        self.stats = Stats()
        self._dispatcher = Dispatcher(c, self.scheduler, self.programs, self.controller, self.stats)
        self._collector = Collector(c, self.controller, self.stats, self._end)
        self._flights: deque[Flight] = deque()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._requests: dict[Handle, Running] = {}
        self._open: set[Handle] = set()  # handles of these, and of those that were submitted since
        self._grammars = Grammars(pair)
        self._arrivals = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._error: Exception | None = None

    def _make_controller(self) -> WidthController:
        return WidthController(self.config.widths)

    @property
    def alive(self) -> bool:
        """Whether requests are taken: False once it is closed, or has failed."""
        return not self._closed and self._error is None

    # What senders call, from any thread.

    def submit(self, request: Request, deliver: Callable[[Event], None] | None = None) -> Handle:
        """Queue a request. InputError for one that cannot be served, `Busy` while too many wait."""
        self._check_alive()
        if self.stats.unfinished >= self.config.max_requests:
            raise Busy(f"{self.config.max_requests} requests are here already; try again later")
        handle = Handle(request, self.cancel, deliver)
        with self._lock:
            self._arrivals += 1
            order = self._arrivals
        running = self._prepare(handle, order)
        with self._lock:  # nothing can end the engine, or all requests, in between
            self._check_alive()
            self.stats.submitted += 1
            self._open.add(handle)
            self._commands.put(Command(running=running))
        return handle

    def _prepare(self, handle: Handle, order: int) -> Running:
        return prepare(self.pair, handle, order, self.config, self._grammars, self.controller)

    def _check_alive(self) -> None:
        if not self.alive:
            raise RuntimeError(f"the engine is closed{f': {self._error}' if self._error else ''}")

    def cancel(self, handle: Handle) -> None:
        """End a request soon; nothing happens to one that has ended."""
        self._commands.put(Command(cancel=handle))

    def cancel_all(self) -> None:
        """End all requests that are here, soon; others can follow."""
        with self._lock:
            for handle in self._open:
                self.cancel(handle)

    def start(self) -> "Engine":
        """Run the loop in a thread of its own."""
        self._thread = threading.Thread(target=self._loop, name="dflash-engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop the loop; requests that are not finished are cancelled."""
        with self._lock:
            self._closed = True
        self._commands.put(Command())
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._take_commands(0)
        self._cancel_all()

    def _cancel_all(self) -> None:
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
                if not self.step() and not self._closed:  # that step may have taken what `close` wakes it with
                    self._take_commands(None)
        except Exception as error:  # whoever waits must hear of it
            with self._lock:
                self._error = error
                waiting, self._open = self._open, set()
            for handle in waiting:
                handle.put(error)
            self._requests.clear()
            raise

    def step(self) -> bool:
        """One turn of the loop; False if there was nothing to do."""
        self._take_commands(self._spare_seconds())
        while self._flights and self._dispatcher.masked:
            self._collect()
        flight = self._dispatcher.dispatch(more=bool(self._flights))
        if flight is not None:
            self._flights.append(flight)
        if self._flights and (flight is None or len(self._flights) > 1):
            self._collect()
            return True
        return flight is not None

    def _collect(self) -> None:
        self._collector.collect(self._flights.popleft())

    def _spare_seconds(self) -> float:
        """How long the next programs may wait for somebody to come: where a request has just ended, its sender may.

        Half a round, since the device has one to do meanwhile: that of the dispatch made before this was known.
        """
        if not self._flights or not self._collector.ended or self.scheduler.waiting:
            return 0.0
        plans = (batch.plan for batch in self._flights[-1].batches)
        return sum(self.controller.cost(plan.load, plan.width) or 0.0 for plan in plans) / 2

    def _take_commands(self, wait: float | None) -> None:
        for command in self._asked(wait):
            self._obey(command)

    def _asked(self, wait: float | None) -> list[Command]:
        """What senders asked for since the last time; if nothing, what comes within `wait` seconds (None: whenever)."""
        asked = []
        with contextlib.suppress(queue.Empty):
            asked.append(self._commands.get(wait != 0, wait))
            while True:
                asked.append(self._commands.get_nowait())
        return asked

    def _obey(self, command: Command) -> None:
        if command.running is not None:
            self._requests[command.running.handle] = command.running
            self.scheduler.waiting.append(command.running)
        elif command.cancel is not None and (known := self._requests.get(command.cancel)) is not None:
            self._end(known, "cancelled")

    def _end(self, running: Running, reason: str | Exception | None = None) -> None:
        """Free what a request holds, and tell its sender. Programs in flight may still run it: nobody reads them."""
        self.scheduler.leave(running)
        del self._requests[running.handle]
        running.finish(reason)
        with self._lock:
            self._open.discard(running.handle)
            self.stats.ended(running, cancelled=reason == "cancelled")
