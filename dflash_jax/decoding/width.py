"""How many rows a round should have: the width with the most tokens a second, by what was measured so far.

Tokens a round come from how often the draft at each place was right after all before it were; seconds a round from
timed dispatches. A width that is not in use is tried now and then, ever more rarely while that changes nothing.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

PROBE_FIRST, PROBE_LAST = 4, 512  # dispatches between two trials of another width
ACCEPTANCE_RATE, COST_RATE = 0.1, 0.3  # weight of a round, and of a timed dispatch, in the running averages
HOPE = 0.7  # acceptance at each place before anything was seen
MARGIN = 1.03  # a change has to promise this much more
ROUNDS, TRIAL = 16, 4  # of a dispatch whose width was chosen
PLAIN_CALLS = 8

Width = int | Literal["adaptive"]


def usual_widths(block: int) -> tuple[int, ...]:
    """Widths to choose among: plain decoding, half a block, a block."""
    return tuple(sorted({1, -(-block // 2), block}))


@dataclass
class _Load:
    """What is known for one kind of dispatch, such as a batch bucket."""

    cost: dict[int, float] = field(default_factory=dict)  # seconds a round by width
    width: int = 0  # in use
    interval: int = PROBE_FIRST
    since: int = 0  # dispatches since the last trial
    turn: int = 0


class WidthController:
    """Chooses among compiled widths, of which 1 is plain decoding."""

    def __init__(self, widths: Sequence[int]):
        self.widths = sorted(set(widths))
        self.acceptance = [HOPE] * (self.widths[-1] - 1)  # of the draft at each place, given all before it
        self.fixed: int | None = None  # a width that is used whatever is known, to measure it; nothing is learnt then
        self._loads: dict[Hashable, _Load] = {}

    def expected(self, width: int, share: float = 1.0) -> float:
        """Tokens a round of `width` rows, where `share` of the sequences can draft."""
        tokens, alive = 1.0, share
        for acceptance in self.acceptance[: width - 1]:
            alive *= acceptance
            tokens += alive
        return tokens

    def observe_counts(self, width: int, counts: Sequence[Sequence[int]]) -> None:
        """Rounds of each sequence that drafted, and how many of the `width` rows were accepted in each."""
        rounds = max(map(len, counts), default=0)
        for place in range(1, width) if self.fixed is None else ():
            reached = [count > place for row in counts for count in row if count >= place]
            if reached:
                # As many steps of the running average at once: sequences side by side are seen in one.
                kept = (1 - ACCEPTANCE_RATE) ** rounds
                mean = sum(reached) / len(reached)
                self.acceptance[place - 1] += (1 - kept) * (mean - self.acceptance[place - 1])

    def observe_cost(self, load: Hashable, width: int, seconds: float) -> None:
        """A round took so long; one outlier counts for no more than twice what was known."""
        if self.fixed is not None:
            return
        cost = self._load(load).cost
        known = cost.get(width)
        cost[width] = seconds if known is None else known + COST_RATE * (min(seconds, 2 * known) - known)

    def assume_costs(self, load: Hashable, costs: Mapping[int, float]) -> None:
        """Costs to begin with."""
        self._load(load).cost.update(costs)

    def _load(self, load: Hashable) -> _Load:
        return self._loads.setdefault(load, _Load())

    def cost(self, load: Hashable, width: int) -> float | None:
        """Seconds a round; None for a width that was never timed."""
        return self._load(load).cost.get(width)

    def rate(self, load: Hashable, width: int, share: float = 1.0) -> float:
        """Tokens a second and sequence; infinite for a width that was never timed."""
        cost = self.cost(load, width)
        return float("inf") if cost is None else self.expected(width, share) / cost

    def choose(self, load: Hashable, share: float = 1.0) -> tuple[int, bool]:
        """(the width of the next dispatch, whether it is a trial, which should be short)."""
        state = self._load(load)
        if not share:
            return self.widths[0], False
        if self.fixed is not None:
            return self.fixed, False
        rates = {width: self.rate(load, width, share) for width in self.widths}
        best = max(rates, key=lambda width: rates[width])
        promise = MARGIN if best > 1 else 1.0  # plain decoding is certain
        if state.width and rates[best] < promise * rates[state.width]:
            best = state.width
        if state.width and best != state.width:
            state.interval = PROBE_FIRST
        state.width, state.since = best, state.since + 1
        others = [width for width in self.widths if width != best]
        if not others or state.since < state.interval:
            return best, False
        state.since, state.turn = 0, state.turn + 1
        state.interval = min(2 * state.interval, PROBE_LAST)
        return others[state.turn % len(others)], True

    def settled(self, load: Hashable) -> bool:
        """Whether several trials in a row have changed nothing."""
        return self.fixed is not None or self._load(load).interval >= 16 * PROBE_FIRST

    def settled_on_plain(self, load: Hashable) -> bool:
        """Whether that is so, and the width in use is plain decoding."""
        return self.settled(load) and (self.fixed or self._load(load).width) == 1


class Pace:
    """How wide and how long the dispatches of a pair are, by what all calls have measured that let it choose."""

    def __init__(self, widths: Sequence[int]):
        self._controller = WidthController(widths)
        self._ran: set[tuple[Hashable, int]] = set()
        self._plain_calls = 0

    def drafts(self, load: Hashable) -> bool:
        """Whether a call should take the drafter along, whose context is not free where nothing is drafted.

        Where plain decoding has proved best, one call in `PLAIN_CALLS` does, to see whether that has changed.
        """
        if not self._controller.settled_on_plain(load):
            return True
        self._plain_calls += 1
        return self._plain_calls % PLAIN_CALLS == 0

    def next(self, load: Hashable) -> tuple[int, int]:
        """(rows a round, most rounds) of the next dispatch."""
        width, trial = self._controller.choose(load)
        if (load, width) not in self._ran:
            return width, 1  # it may have to be compiled
        return width, TRIAL if trial else ROUNDS

    def saw(self, load: Hashable, width: int, counts: Sequence[Sequence[int]], seconds: float) -> None:
        """A dispatch took so long; `counts` are the rows accepted in each round of each sequence."""
        rounds = max(map(len, counts), default=0)
        if width > 1:
            self._controller.observe_counts(width, counts)
        if rounds and (load, width) in self._ran:
            self._controller.observe_cost(load, width, seconds / rounds)
        self._ran.add((load, width))
