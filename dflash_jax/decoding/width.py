"""How many rows a round should have: the width with the most tokens a second, by what was measured so far.

Whether drafts are right is a property of the text, so each request has its own running acceptance (`Text`), which
begins at that of all requests (`Prior`). Seconds a round come from timed dispatches. A request whose drafts do not pay
tries them again after some of its own tokens, ever more rarely, and all trials take a small share of the time.
"""

import math
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

PRIOR_RATE, COST_RATE = 0.1, 0.3  # weight of a round, and of a timed dispatch, in the running averages
HOPE = 0.7  # acceptance at each place before anything was seen
PRIOR_ROUNDS = 0.5  # what all requests have shown counts as much as so many rounds of the request's own
ROUND_KEEPS, PLAIN_KEEPS = 0.93, 0.9  # of a text's evidence, after each round and each token without drafts
MARGIN = 1.03  # more rows have to promise this much more than one
TRIAL_AGAIN = 8  # tokens of a new text between its first trial and its second
TRIAL_SHARE, TRIALS_SHARE = 0.015, 0.04  # of a text's time for its further trials, and of all time for all trials
WIDE_ENOUGH = 0.85  # of the best rate with drafts: so much a wider trial may cost, which shows more
TRIALS_KEPT = 8  # so many trials' time may be saved up
STALE = 256  # dispatches after which a width is timed again
MOST_ROUNDS, FEW_ROUNDS = 16, 2  # of a dispatch whose width was chosen, and of one for texts that showed no more yet

Width = int | Literal["adaptive"]


def usual_widths(block: int) -> tuple[int, ...]:
    """Return the widths to choose among: plain decoding, half a block, a block."""
    return tuple(sorted({1, -(-block // 2), block}))


class Prior:
    """How often the draft at each place was right, given all before it: a running average over all requests."""

    def __init__(self, places: int):
        self.acceptance = [HOPE] * places

    def observe(self, width: int, counts: Sequence[Sequence[int]]) -> None:
        """Take in the rows accepted in each round of `width` rows of each sequence."""
        rounds = max(map(len, counts), default=0)
        for place in range(1, width):
            reached = [count > place for row in counts for count in row if count >= place]
            if reached:
                # As many steps of the running average at once: sequences side by side are seen in one.
                kept = (1 - PRIOR_RATE) ** rounds
                mean = sum(reached) / len(reached)
                self.acceptance[place - 1] += (1 - kept) * (mean - self.acceptance[place - 1])


class Text:
    """How often the drafts of one request were right, place by place, and when it may try some again."""

    def __init__(self, prior: Prior):
        self.prior = prior
        self._reached, self._right = ([0.0] * len(prior.acceptance) for _ in range(2))
        self._tokens = self._gap = 0  # tokens; plain ones since drafts were seen
        self._tried, self._trials = 0, 0  # tokens when drafts were tried last, and how often they were
        self.rounds = 0  # with drafts

    def observe(self, width: int, counts: Sequence[int]) -> None:
        """Take in the rows accepted in each of its rounds of `width` rows, the anchor's included."""
        self._tokens += sum(counts)
        if width == 1:
            self._gap += len(counts)
            return
        self.rounds += len(counts)
        keeps = PLAIN_KEEPS**self._gap
        for count in counts:
            self._reached, self._right = ([keeps * x for x in xs] for xs in (self._reached, self._right))
            for place in range(min(count, width - 1)):
                self._reached[place] += 1
                self._right[place] += count > place + 1
            keeps, self._gap = ROUND_KEEPS, 0

    def expected(self, width: int) -> float:
        """Return the tokens of a round of `width` rows."""
        tokens = alive = 1.0
        for prior, reached, right in zip(self.prior.acceptance[: width - 1], self._reached, self._right, strict=False):
            alive *= (PRIOR_ROUNDS * prior + right) / (PRIOR_ROUNDS + reached)
            tokens += alive
        return tokens

    def due(self, rounds: float) -> bool:
        """Return whether it is time for a trial that costs as much as so many plain rounds: at once in a new text."""
        waits = (0, TRIAL_AGAIN, max(TRIAL_AGAIN, rounds / TRIAL_SHARE))
        return self._tokens - self._tried >= waits[min(self._trials, 2)]

    def drafts(self) -> None:
        """Note that a dispatch with drafts begins."""
        self._tried, self._trials = self._tokens, self._trials + 1


@dataclass(frozen=True)
class Group:
    """Some of the requests that run, by their places in the list, and how wide their next rounds are."""

    members: tuple[int, ...]
    width: int
    most: int = sys.maxsize  # rounds, after which the width may be another one


@dataclass
class _Load:
    """What is known for one kind of dispatch, such as a batch bucket."""

    cost: dict[int, float] = field(default_factory=dict)  # seconds a round by width
    timed: dict[int, int] = field(default_factory=dict)  # the dispatch that was timed last, by width
    dispatches: int = 0


class WidthController:
    """Chooses among compiled widths, of which 1 is plain decoding."""

    def __init__(self, widths: Sequence[int]):
        self.widths = sorted(set(widths))
        self.free, self.bound = (Prior(self.widths[-1] - 1) for _ in range(2))  # without a grammar, and with one
        self.fixed: int | None = (
            None  # a width that is used whatever is known, to measure it; no acceptance is learnt then
        )
        self._loads: dict[Hashable, _Load] = {}
        self._saved = math.inf  # seconds that trials may take

    def text(self, grammar: bool = False) -> Text:
        """Return what is known of a new request."""
        return Text(self.bound if grammar else self.free)

    def observe_counts(
        self, load: Hashable, width: int, texts: Sequence[Text], counts: Sequence[Sequence[int]]
    ) -> None:
        """Take in the rows accepted in each round of each request of a dispatch, all with one prior."""
        if self.fixed is not None:
            return
        rounds = max(map(len, counts), default=0)
        self._saved += TRIALS_SHARE * rounds * (self.cost(load, width) or 0.0)
        for text, row in zip(texts, counts, strict=True):
            text.observe(width, row)
        if width > 1 and texts:
            texts[0].prior.observe(width, counts)

    def observe_cost(self, load: Hashable, width: int, seconds: float) -> None:
        """Take in what a round took; one outlier counts for no more than twice what was known."""
        known = self.cost(load, width)
        state = self._load(load)
        state.cost[width] = seconds if known is None else known + COST_RATE * (min(seconds, 2 * known) - known)
        state.timed[width] = state.dispatches

    def assume_costs(self, load: Hashable, costs: Mapping[int, float]) -> None:
        """Begin with these costs."""
        self._load(load).cost.update(costs)

    def _load(self, load: Hashable) -> _Load:
        return self._loads.setdefault(load, _Load())

    def cost(self, load: Hashable, width: int) -> float | None:
        """Return seconds a round; None for a width that was never timed."""
        return self._load(load).cost.get(width)

    def rate(self, load: Hashable, width: int, texts: Sequence[Text | None]) -> float:
        """Return tokens a second and sequence, the harmonic mean; infinite for a width that was never timed.

        So the seconds that requests wait for a token count, and one that gains much hardly makes up for one that loses.
        None: it cannot draft.
        """
        cost = self.cost(load, width)
        if cost is None:
            return math.inf
        waits = [1.0 if text is None else 1 / text.expected(width) for text in texts]
        return len(waits) / sum(waits) / cost

    def best(self, load: Hashable, texts: Sequence[Text | None], widths: Sequence[int] | None = None) -> int:
        """Return the width of the highest rate; plain decoding where no other promises clearly more."""
        plain, *others = self.widths if widths is None else widths
        rates = {plain: MARGIN * self.rate(load, plain, texts)}
        rates |= {width: self.rate(load, width, texts) for width in others}
        return max(rates, key=lambda width: rates[width])

    def arrange(
        self,
        texts: Sequence[Text | None],
        load: Callable[[int], Hashable],
        widths: Sequence[int] | None = None,
        apart: bool = True,
    ) -> list[Group]:
        """Split requests into groups for the next dispatches: mostly one, sometimes one that tries drafts beside it.

        Args:
            texts: of each request; None for one that cannot draft.
            load: from a number of requests to the kind of dispatch that takes so many.
            widths: to choose among; all if left out.
            apart: whether some may run apart from the others.
        """
        everyone, here = tuple(range(len(texts))), load(len(texts))
        widths = self.widths if widths is None else widths
        if self.fixed is not None or not any(texts):
            return [Group(everyone, self.fixed if self.fixed is not None and any(texts) else widths[0])]
        state, best = self._load(here), self.best(here, texts, widths)
        state.dispatches += 1
        groups = self._trial(texts, load, best, widths[1:], apart) if best < widths[-1] else None
        if groups is None:
            stale = self._stale(state, [width for width in widths if width != best])
            few = best > 1 and any(text is not None and text.rounds < FEW_ROUNDS for text in texts)
            most = FEW_ROUNDS if few else sys.maxsize
            groups = [Group(everyone, best, most) if stale is None else Group(everyone, stale, most=1)]
        for group in groups:
            for text in (texts[i] for i in group.members):
                if text is not None and group.width > 1:
                    text.drafts()
        return groups

    def _stale(self, state: _Load, others: Sequence[int]) -> int | None:
        """Return a width that has to be timed again; None: all of them are known well enough."""
        oldest = min(others, key=lambda width: state.timed.setdefault(width, state.dispatches), default=None)
        if oldest is None or state.dispatches - state.timed[oldest] < STALE:
            return None
        state.timed[oldest] = state.dispatches
        return oldest

    def _trial(
        self,
        texts: Sequence[Text | None],
        load: Callable[[int], Hashable],
        best: int,
        wider: Sequence[int],
        apart: bool,
    ) -> list[Group] | None:
        """Return groups in which requests that are due try drafts; None: nobody is, or there is no time."""
        here = load(len(texts))
        rates = {width: self.rate(here, width, texts) for width in wider}
        widest = max(width for width in wider if rates[width] >= WIDE_ENOUGH * max(rates.values()))
        now, together = self.cost(here, best), self.cost(here, widest)
        if now is None or together is None:
            return None
        due = tuple(i for i, text in enumerate(texts) if text is not None and text.due((together - now) / now))
        rest = tuple(i for i in range(len(texts)) if i not in due)
        if not due:
            return None
        groups, extra = [Group(tuple(range(len(texts))), widest, most=1)], together - now
        own, others = (self.cost(load(max(1, len(x))), w) for x, w in ((due, widest), (rest, best)))
        if apart and rest and own is not None and others is not None and own + others - now < extra:
            groups, extra = [Group(due, widest, most=1), Group(rest, best)], own + others - now
        if extra > self._saved:
            return None
        self._saved = min(self._saved, TRIALS_KEPT * max(extra, 0.0)) - extra
        return groups


class Pace:
    """How wide and how long the dispatches of a pair are, by what all calls have measured that let it choose."""

    def __init__(self, widths: Sequence[int]):
        self._controller = WidthController(widths)
        self._ran: set[tuple[Hashable, int]] = set()

    def texts(self, count: int) -> list[Text]:
        """Return what is known of so many new sequences."""
        return [self._controller.text() for _ in range(count)]

    def next(self, load: Hashable, texts: Sequence[Text]) -> tuple[int, int]:
        """Return (rows a round, most rounds) of the next dispatch of the sequences that still run."""
        (group,) = self._controller.arrange(texts, lambda count: load, apart=False)
        ran = (load, group.width) in self._ran  # else it may have to be compiled
        return group.width, min(group.most, MOST_ROUNDS) if ran else 1

    def saw(
        self, load: Hashable, width: int, texts: Sequence[Text], counts: Sequence[Sequence[int]], seconds: float
    ) -> None:
        """Take in a dispatch that took so long; `counts` are the rows accepted in each round of each sequence."""
        rounds = max(map(len, counts), default=0)
        self._controller.observe_counts(load, width, texts, counts)
        if rounds and (load, width) in self._ran:
            self._controller.observe_cost(load, width, seconds / rounds)
        self._ran.add((load, width))
