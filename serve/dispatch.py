"""What runs next: prompts into slots, chunks of them, and rounds of all that decode."""

import math
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial

import jax

from dflash_jax.decoding.width import Group, Text, WidthController
from serve.config import Plan, Resolved
from serve.passes import PassCosts
from serve.programs import Drafted, Programs
from serve.requests import Running
from serve.scheduler import Pass, Scheduler
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
    over: Pass | None = None  # prompts
    first: tuple[jax.Array, jax.Array | None] | None = None  # news of that pass, and log-probabilities of prompts
    batches: list[Batch] = field(default_factory=list)


@dataclass(frozen=True)
class Reserved:
    """Rounds that there are pages for, the new ones as deltas."""

    plan: Plan
    rows: list[Running]
    deltas: list[tuple[int, int, int]]


class Dispatcher:
    """Chooses and starts programs; waits for none of them but the drafts of requests with grammars."""

    def __init__(
        self, config: Resolved, scheduler: Scheduler, programs: Programs, controller: WidthController, stats: Stats
    ):
        self.config, self.scheduler, self.programs = config, scheduler, programs
        self.controller, self.stats = controller, stats
        drafter = programs.pair.drafter if len(config.widths) > 1 else None
        self._pass_costs = PassCosts(controller)
        self._passed = 0.0  # seconds of passes over prompts since the last rounds
        self._last_draft = 0 if drafter is None else (drafter.config.max_position or sys.maxsize)

    @property
    def masked(self) -> bool:
        """Whether requests with grammars run, whose next round needs the news of their last."""
        return any(r.matcher is not None for r in self.scheduler.running)

    def dispatch(self, more: bool) -> Flight | None:
        """The next programs; None: there is nothing to do, or not before the news of others, of which `more` come."""
        while (admitted := self.scheduler.admit()) is not None:
            self.programs.admit(*admitted)
            self.stats.admitted(admitted[0])
        flight = Flight(time.perf_counter())
        if (over := self._next_pass()) is not None:
            flight.over, flight.first = over, self.programs.prefill(over.shape, over.chunks)
            return flight
        self._passed = 0.0
        masked = self._reserve(self._masked_rows, self._masked_plans, more)
        drafted = None if masked is None else self.programs.propose(masked.rows, masked.plan)
        # While the host finds out what may follow the drafts, the device runs the others.
        for rows, group in self._groups(self._free_rows()):
            more_comes = more or masked is not None or bool(flight.batches)
            free = self._reserve(partial(self._still_free, rows), partial(self._plans, group), more_comes)
            if free is not None:
                places, news = self.programs.rounds(free.rows, free.deltas, free.plan)
                flight.batches.append(self._started(free, places, news))
        if masked is not None and drafted is not None:
            flight.batches.append(self._started(masked, drafted.places, self._check(masked, drafted)))
        return flight if flight.batches else None

    def _next_pass(self) -> Pass | None:
        """Return a pass over prompts, if one comes next: some may before rounds, which cost the same for few slots."""
        if self._passed >= self.config.dispatch_ms / 1e3 and any(r.decoding for r in self.scheduler.running):
            return None
        over = self.scheduler.chunks(self.config.prefill, self._quick)
        if over is not None:
            seconds = self._pass_costs.seconds(over.shape, over.before)
            self._passed += math.inf if seconds is None else seconds
        return over

    def _quick(self, shape: tuple[int, int], before: int) -> bool:
        seconds = self._pass_costs.seconds(shape, before)
        return seconds is None or seconds <= self.config.pass_ms / 1e3

    def _reserve(
        self, rows_now: Callable[[], list[Running]], plans: Callable[[list[Running]], tuple[Plan, ...]], more: bool
    ) -> Reserved | None:
        """The first plan with pages for all that may come of it; None: nobody is there to run, or too few pages."""
        while rows := rows_now():
            for plan in plans(rows):
                if (deltas := self.scheduler.reserve(rows, plan.rounds * plan.width)) is not None:
                    return Reserved(plan, rows, deltas)
            if more:
                return None  # with their news it will be known what is needed
            if self.scheduler.preempt() is not None:
                self.stats.preempted += 1
        return None

    def _started(self, reserved: Reserved, places: list[int], news: jax.Array) -> Batch:
        plan = reserved.plan
        for r in reserved.rows:
            r.least += 1
            r.most += plan.rounds * plan.width
        return Batch(plan, reserved.rows, places, news)

    def _check(self, masked: Reserved, drafted: Drafted) -> jax.Array:
        """Verify the drafts under their masks."""
        drafts = [()] * len(masked.rows)
        if masked.plan.width > 1:
            drafts = drafted.tokens()
            self.stats.host_syncs += 1
        masks = [
            r.matcher.masks(tokens, masked.plan.width)
            for r, tokens in zip(masked.rows, drafts, strict=True)
            if r.matcher is not None
        ]
        return self.programs.check(drafted, masks, masked.deltas)

    def _free_rows(self) -> list[Running]:
        return [r for r in self.scheduler.running if r.decoding and r.matcher is None]

    def _still_free(self, rows: list[Running]) -> list[Running]:
        """Return those of some rows that still have a slot: one may have given its own back for others."""
        return [r for r in rows if r.decoding]

    def _masked_rows(self) -> list[Running]:
        return [r for r in self.scheduler.running if r.decoding and r.matcher is not None and r.settled]

    def _bucket(self, count: int) -> int:
        return next(b for b in self.config.buckets if b >= count)

    def _masked_plans(self, rows: list[Running]) -> tuple[Plan, ...]:
        c, texts = self.config, [self._text(r) for r in rows]

        def load(count: int) -> Hashable:
            return c.masked(self._bucket(count), 1).load

        (group,) = self.controller.arrange(texts, load, c.masked_widths, apart=False)
        return (c.masked(self._bucket(len(rows)), group.width),)

    def _groups(self, rows: list[Running]) -> list[tuple[list[Running], Group]]:
        """Return the batches to run next, each with its width."""
        if not rows:
            return []
        settings = self.config.plan_for(r.sampling.plan for r in rows)
        groups = self.controller.arrange([self._text(r) for r in rows], lambda n: (settings, self._bucket(n)))
        return [([rows[i] for i in group.members], group) for group in groups]

    def _plans(self, group: Group, rows: list[Running]) -> tuple[Plan, ...]:
        """How to run the next rounds of these requests, and how where pages are scarce."""
        c, bucket, running = self.config, self._bucket(len(rows)), self.scheduler.running
        settings = c.plan_for(r.sampling.plan for r in rows)
        load, others = (settings, bucket), any(r.waits_for_prefill or r.matcher is not None for r in running)
        rounds = min(group.most, self._rounds(load, group.width, others))
        plan = Plan(bucket, settings, group.width, rounds, load)
        return plan, plan.of(rounds=1)

    def _rounds(self, load: Hashable, width: int, others: bool) -> int:
        """How many a dispatch has: as many as may be, but not many long ones where `others` wait or could come."""
        c, cost = self.config, self.controller.cost(load, width)
        most = c.rounds_while_filling if others else c.sizes.rounds
        if cost is None or not (others or any(r is None or r.least >= r.limit for r in self.scheduler.slots)):
            return most
        return max(1, int(min(most, c.dispatch_ms / 1e3 / cost)))

    def _text(self, r: Running) -> Text | None:
        """Return what is known of a request's drafts; None: it is too long for the drafter."""
        return r.text if r.most + self.config.sizes.width <= self._last_draft else None
