"""What the device has done: its news become tokens of requests, and what is known of acceptance and cost."""

import time
from collections.abc import Callable

import jax
import numpy as np

from dflash_jax.decoding.width import WidthController
from dflash_jax.errors import InputError
from serve.config import Resolved
from serve.device import LAST
from serve.dispatch import Batch, Flight
from serve.news import News, logprobs_of, news_of
from serve.passes import PassCosts
from serve.requests import Running
from serve.stats import Stats


class Collector:
    """Reads the news of flights. `end` is called with each request that has come to its end, and why."""

    def __init__(
        self,
        config: Resolved,
        controller: WidthController,
        stats: Stats,
        end: Callable[[Running, str | Exception | None], None],
    ):
        self.config, self.controller, self.stats, self._end = config, controller, stats, end
        self._pass_costs = PassCosts(controller)
        self._last = 0.0  # when the news before these were there
        self.ended = False  # whether a request came to its end with the last news

    def collect(self, flight: Flight) -> None:
        """Read the news of a flight: the place where the host waits for the device."""
        first, news = jax.device_get((flight.first, [batch.news for batch in flight.batches]))
        now = time.perf_counter()
        self.stats.host_syncs += 1
        self.ended = False
        seconds = now - max(self._last, flight.since)
        if flight.over is not None:
            self._pass_costs.observe(flight.over.shape, flight.over.before, seconds)
            rows, scores = first
            for place, (row, chunk) in enumerate(zip(rows, flight.over.chunks, strict=False)):
                if scores is not None and not chunk.running.done:
                    room, top = flight.over.shape[1], self.config.everything.logprobs
                    found = logprobs_of(scores[place], room, top, chunk.count)
                    chunk.running.output.score(chunk.start + 1, found)
                self.stats.prefill_tokens += chunk.count
                if chunk.kind == LAST and not chunk.running.done:
                    said = news_of(row, 0, 1, self.config.everything.logprobs)
                    self._take(chunk.running, said, expected=(1, 1), width=1)
        for batch, rows in zip(flight.batches, news, strict=True):
            self._take_batch(batch, rows, seconds if len(flight.batches) == 1 else None)
        self._last = now

    def _take_batch(self, batch: Batch, news: np.ndarray, seconds: float | None) -> None:
        """What came of a batch of rounds; `seconds` is how long they took, where that is known."""
        plan = batch.plan
        rounds = 1 if plan.grammar else self.config.sizes.rounds
        said = [news_of(news[place], rounds, rounds * plan.width, plan.settings.logprobs) for place in batch.places]
        self._learn(batch, [entry.counts for entry in said], seconds)
        expected = 1, plan.rounds * plan.width
        for r, entry in zip(batch.rows, said, strict=True):
            if not r.done:
                self._take(r, entry, expected=expected, width=plan.width)

    def _take(self, r: Running, said: News, *, expected: tuple[int, int], width: int) -> None:
        """What a request has said; `expected` is how much was thought to be the least and the most."""
        before, emitted, counts = len(r.output.tokens), len(said.tokens), said.counts
        kept = emitted if r.matcher is None else r.matcher.take(said.tokens)
        r.output.extend(said.tokens[:kept], counts, said.logprobs)
        r.behind = said.behind
        r.least += emitted - expected[0]
        r.most += emitted - expected[1]
        self.stats.tokens += len(r.output.tokens) - before
        if width > 1:
            r.drafted += (width - 1) * len(counts)
            r.accepted += sum(counts) - len(counts)
        if r.matcher is not None and r.matcher.error is not None:
            self._finish(r, InputError(f"the grammar cannot be followed: {r.matcher.error}"))
        elif r.matcher is not None and r.matcher.complete:
            self._finish(r, "stop")
        elif said.ended or r.output.transcript.stopped:
            self._finish(r, None)
        elif piece := r.output.piece():
            r.handle.put(piece)

    def _finish(self, r: Running, reason: str | Exception | None) -> None:
        self.ended = True
        self._end(r, reason)

    def _learn(self, batch: Batch, counts: list[list[int]], seconds: float | None) -> None:
        """Acceptance and cost of the rounds, for the controller and for whoever watches."""
        plan, done = batch.plan, max(map(len, counts), default=0)
        self.stats.saw_rounds(plan.width, [count for row in counts for count in row], done)
        self.controller.observe_counts(plan.load, plan.width, [r.text for r in batch.rows], counts)
        if seconds is not None and done:
            self.controller.observe_cost(plan.load, plan.width, seconds / done)
