"""What runs next: prompts into slots, chunks of them, and rounds of all that decode."""

import time
from dataclasses import dataclass, field

import jax

from dflash_jax.decoding.width import WidthController
from serve.config import Plan, Resolved
from serve.programs import Programs
from serve.requests import Running
from serve.scheduler import Chunk, Scheduler
from serve.stats import Stats


@dataclass(frozen=True)
class Batch:
    """Rounds on the device, and what their news are about."""

    plan: Plan
    rows: list[Running]
    places: list[int]  # rows of the news that they are in
    news: jax.Array


@dataclass
class Flight:
    """One step's programs on the device."""

    since: float
    chunks: list[Chunk] = field(default_factory=list)
    first: jax.Array | None = None  # news of the chunks
    batch: Batch | None = None


class Dispatcher:
    """Chooses and starts programs; waits for none of them."""

    def __init__(
        self, config: Resolved, scheduler: Scheduler, programs: Programs, controller: WidthController, stats: Stats
    ):
        self.config, self.scheduler, self.programs = config, scheduler, programs
        self.controller, self.stats = controller, stats
        drafter = programs.pair.drafter
        self._drafts = drafter is not None and len(config.widths) > 1
        self._longest = 0 if drafter is None else drafter.config.max_position

    def dispatch(self, more: bool) -> Flight | None:
        """The next programs; None: there is nothing to do, or not before the news of others, of which `more` come."""
        while (admitted := self.scheduler.admit()) is not None:
            self.programs.admit(*admitted)
            self.stats.admitted(admitted[0])
        flight = Flight(time.perf_counter())
        if (prefill := self.scheduler.chunks(self.config.prefill)) is not None:
            flight.chunks = prefill[1]
            flight.first = self.programs.prefill(*prefill)
        flight.batch = self._rounds(more or bool(flight.chunks))
        return flight if flight.chunks or flight.batch else None

    def _rounds(self, more: bool) -> Batch | None:
        rows = self._decoding()
        found = None
        while rows and (found := self._reserve(rows)) is None:
            if more:
                return None  # with their news it will be known what is needed
            if self.scheduler.preempt() is not None:
                self.stats.preempted += 1
            rows = self._decoding()
        if not rows or found is None:
            return None
        plan, deltas = found
        places, news = self.programs.rounds(rows, deltas, plan)
        for r in rows:
            r.least += 1 if plan.leave else plan.rounds
            r.most += plan.rounds * plan.width
            if not plan.draft and r.cold is None:
                r.cold = len(r.tokens) - 1
        return Batch(plan, rows, places, news)

    def _decoding(self) -> list[Running]:
        return [r for r in self.scheduler.running if r.decoding]

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
        width, trial = self.controller.choose(load, share) if c.adaptive else (c.widths[-1] if share else 1, False)
        plain = width == 1 and (share == 0 or not c.adaptive or self.controller.settled(load))
        draft = self._drafts and not plain
        return Plan(
            bucket, settings, width, draft, min(rounds, 2) if trial else rounds, bool(self.scheduler.waiting), load
        )

    def _can_draft(self, r: Running) -> bool:
        if self.programs.pair.drafter is None or r.cold is not None:
            return False
        return not self._longest or r.most + self.config.sizes.width <= self._longest
