"""What the device has done: its news become tokens of requests, and what is known of acceptance and cost."""

import time
from collections.abc import Callable

import jax

from dflash_jax.decoding.width import WidthController
from serve import steps
from serve.config import Plan, Resolved
from serve.device import LAST
from serve.dispatch import Batch, Flight
from serve.requests import Running
from serve.stats import Stats


class Collector:
    """Reads the news of flights. `end` is called with each request that has come to its end."""

    def __init__(self, config: Resolved, controller: WidthController, stats: Stats, end: Callable[[Running], None]):
        self.config, self.controller, self.stats, self._end = config, controller, stats, end
        self._last = 0.0  # when the news before these were there

    def collect(self, flight: Flight) -> None:
        """Read the news of a flight: the only place where the host waits for the device."""
        batch = flight.batch
        first, news = jax.device_get((flight.first, None if batch is None else batch.news))
        now = time.perf_counter()
        self.stats.host_syncs += 1
        if flight.first is not None:
            for row, chunk in zip(first, flight.chunks, strict=False):
                self.stats.prefill_tokens += chunk.count
                if chunk.kind == LAST and not chunk.running.done:
                    self._take(chunk.running, *steps.news_of(row, 0), expected=(1, 1), plan=None)
        if batch is not None:
            plan, rounds = batch.plan, self.config.sizes.rounds
            taken = [steps.news_of(news[place], rounds) for place in batch.places]
            seconds = None if flight.chunks else now - max(self._last, flight.since)
            self._learn(batch, [counts for _, counts, _ in taken], seconds)
            expected = (1 if plan.leave else plan.rounds), plan.rounds * plan.width
            for r, entry in zip(batch.rows, taken, strict=True):
                if not r.done:
                    self._take(r, *entry, expected=expected, plan=plan)
        self._last = now

    def _take(
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

    def _learn(self, batch: Batch, counts: list[list[int]], seconds: float | None) -> None:
        """Acceptance and cost of the rounds, for the controller and for whoever watches."""
        plan = batch.plan
        drafting = [count for r, row in zip(batch.rows, counts, strict=True) if r.cold is None for count in row]
        done = max(map(len, counts), default=0)
        self.stats.saw_rounds(plan.width, [count for row in counts for count in row], done)
        if plan.width > 1:
            self.controller.observe_counts(plan.width, drafting)
        if seconds is not None and done:
            self.controller.observe_cost(plan.load, plan.width, seconds / done)
