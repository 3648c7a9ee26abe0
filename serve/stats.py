"""What the engine has done so far, as plain counters."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from serve.requests import Running


@dataclass
class Stats:
    """Counters since the start. Written by the engine's thread; reading them from others is harmless."""

    submitted: int = 0
    finished: int = 0  # to their own end
    cancelled: int = 0
    preempted: int = 0
    tokens: int = 0  # of outputs
    prompt_tokens: int = 0  # of admitted requests
    cached_tokens: int = 0  # of these, found in the prefix cache
    admissions: int = 0  # requests that have got a slot at least once
    prefix_hits: int = 0  # of these, with tokens from the prefix cache
    prefill_tokens: int = 0  # run through the models
    rounds: int = 0
    dispatches: int = 0  # of rounds
    host_syncs: int = 0  # times that the host has read from the device
    drafted: int = 0
    accepted: int = 0
    accepted_at: Counter[int] = field(default_factory=Counter)  # drafts accepted by place in the block, from 1
    drafted_at: Counter[int] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)  # dispatches by width

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return self.submitted - self.finished - self.cancelled

    def admitted(self, running: Running) -> None:
        """A request has got a slot, for the first time or again."""
        if not running.output.tokens:
            self.prompt_tokens += len(running.prompt)
            self.cached_tokens += running.cached
            self.admissions += 1
            self.prefix_hits += running.cached > 0

    def ended(self, running: Running, cancelled: bool) -> None:
        """A request is gone."""
        if cancelled:
            self.cancelled += 1
        else:
            self.finished += 1

    def saw_rounds(self, width: int, counts: Sequence[int], rounds: int) -> None:
        """One dispatch: rows accepted in each round of each request."""
        self.dispatches += 1
        self.rounds += rounds
        self.widths[width] += 1
        if width == 1:
            return
        self.drafted += (width - 1) * len(counts)
        self.accepted += sum(counts) - len(counts)
        for count in counts:
            self.accepted_at.update(range(1, count))
        for place in range(1, width):
            self.drafted_at[place] += len(counts)
