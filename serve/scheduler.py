"""Who gets slots and pages, in what order: all on the host, and nothing of it waits for the device.

Requests get slots in the order of arrival; but those with a prompt that is being prefilled for another, as the choices
of one call have, wait until they can find it in the prefix cache. Passes over prompts take short ones first. A request
is admitted when there are pages for its prompt and its first dispatch; later ones are reserved before each dispatch,
for every token that may come of it. Where they run out, the request that came last gives its own back and is run again
later, from its prompt and what it has said so far.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from serve.device import LAST, MIDDLE, RESUMED
from serve.pages import Pages
from serve.prefix import PrefixCache
from serve.requests import Running

TURNS = 4  # passes in which shorter prompts that came later may go before one


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a prompt to prefill."""

    running: Running
    start: int  # tokens before them
    count: int
    kind: int  # MIDDLE, LAST or RESUMED
    save: int | None  # where to keep the recurrent state behind it


@dataclass(frozen=True)
class Pass:
    """A pass over some prompts."""

    shape: tuple[int, int]  # prompts, tokens of each
    before: int  # most tokens of a prompt before its rows
    chunks: list[Chunk]


def _turn(r: Running) -> tuple[int, int, int]:
    """Return what prompts are sorted by."""
    return -max(0, r.passed - TURNS + 1), r.goal - r.prefilled, r.order


class Scheduler:
    """Slots, pages and the queue."""

    def __init__(self, slots: int, page: int, ahead: int, pages: Pages, prefix: PrefixCache | None):
        """`ahead` is how many tokens a request may add in one dispatch."""
        self.slots: list[Running | None] = [None] * slots
        self.waiting: deque[Running] = deque()
        self.page, self.ahead, self.pages, self.prefix = page, ahead, pages, prefix

    @property
    def running(self) -> list[Running]:
        """Requests that have a slot, in order of arrival."""
        return sorted((r for r in self.slots if r is not None), key=lambda r: r.order)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def pages_of(self, running: Running) -> int:
        """Pages of a request at its longest."""
        return self._pages_for(running.limit)

    def _get(self, count: int) -> list[int] | None:
        """New pages, from the prefix cache if need be; None where there are not so many."""
        if self.pages.free + self.pages.idle < count:
            return None
        if self.pages.free < count and self.prefix is not None:
            self.prefix.evict(count)
        return self.pages.take(count)

    def admit(self) -> tuple[Running, int | None] | None:
        """The next request, now in a slot with pages, and its checkpoint; None: nobody waits, or there is no room."""
        if None not in self.slots:
            return None
        filling = [r for r in self.running if r.waits_for_prefill]
        if (new := next((r for r in self.waiting if not self._comes_soon(r, filling)), None)) is None:
            return None
        new.take_slot(self.slots.index(None))
        match = None
        if self.prefix is not None and new.output.prompt_top is None:  # else each token's row is needed
            match = self.prefix.match(new.tokens[: new.goal], new.salt)
        shared = [] if match is None else match.pages
        self.pages.share(shared)
        needed = self._pages_for(min(new.goal + self.ahead, new.limit)) - len(shared)
        others = sum(r is not None for r in self.slots)
        # A page of margin for each that runs: else it would have to go again at once.
        if self.pages.free + self.pages.idle < needed + others or (own := self._get(needed)) is None:
            self.pages.release(shared)
            new.slot = -1
            return None
        self.waiting.remove(new)
        self.slots[new.slot] = new
        new.pages, new.prefilled = [*shared, *own], len(shared) * self.page
        if not new.output.tokens:
            new.cached = new.prefilled
        new.cuts = ()
        if match is not None and self.prefix is not None and self.prefix.recurrent:
            # Where another prompt went another way, and the last page that this one fills.
            last = (new.goal - 1) // self.page * self.page
            new.cuts = tuple(sorted({c for c in (match.common * self.page, last) if c > new.prefilled}))
        return new, None if match is None else match.checkpoint

    def _comes_soon(self, new: Running, filling: Sequence[Running]) -> bool:
        """Whether the prefix cache is about to have more of a prompt."""
        last = (len(new.prompt) - 1) // self.page * self.page
        if self.prefix is None or not last or new.output.prompt_top is not None:
            return False
        return any(r.cached < last and r.prompt == new.prompt and r.salt == new.salt for r in filling)

    def chunks(
        self, shapes: Sequence[tuple[int, int]], quick: Callable[[tuple[int, int], int], bool] = lambda *_: True
    ) -> Pass | None:
        """Return the next pass over prompts, in one of `shapes`: (prompts, tokens of each), small ones first.

        The prompt with the least left comes first, but for one that later ones went before too often. The pass is as
        wide as that prompt needs. Those come along that then take a pass less.

        Args:
            shapes: that there are programs for.
            quick: whether a pass of a shape, behind so many tokens, is short enough; the narrowest always is.
        """
        pending = sorted((r for r in self.running if r.waits_for_prefill), key=_turn)
        if not pending:
            return None
        first, widths = pending[0], sorted({tokens for _, tokens in shapes})
        while len(widths) > 1 and not quick((1, widths[-1]), first.prefilled):
            widths.pop()
        left = [self._next_stop(r) - r.prefilled for r in pending]
        tokens = next((tokens for tokens in widths if tokens >= left[0]), widths[-1])
        along = (r for r, n in zip(pending[1:], left[1:], strict=True) if (n - 1) % widths[-1] < tokens)
        chosen = [first, *along]
        before = max(r.prefilled for r in chosen)
        alike = [shape for shape in shapes if shape[1] == tokens]
        alike = [shape for shape in alike if quick(shape, before)] or alike[:1]
        shape = next((shape for shape in alike if shape[0] >= len(chosen)), alike[-1])
        del chosen[shape[0] :]
        for r in pending:
            r.passed = 0 if r in chosen else r.passed + (r.order < first.order)
        return Pass(shape, before, [self._chunk(r, tokens) for r in chosen])

    def _next_stop(self, r: Running) -> int:
        return next((cut for cut in r.cuts if cut > r.prefilled), r.goal)

    def _chunk(self, r: Running, most: int) -> Chunk:
        stop = min(r.prefilled + most, self._next_stop(r))
        start, count, r.prefilled, save = r.prefilled, stop - r.prefilled, stop, None
        if self.prefix is not None and (stop in r.cuts or stop == r.goal):
            full = stop // self.page
            node = self.prefix.insert(r.tokens[: full * self.page], r.pages[:full], r.salt)
            if node is not None and stop in r.cuts:
                save = self.prefix.checkpoint(node)
        if stop < r.goal:
            return Chunk(r, start, count, MIDDLE, save)
        if r.output.tokens:
            return Chunk(r, start, count, RESUMED, save)
        r.least, r.most = r.least + 1, r.most + 1
        return Chunk(r, start, count, LAST, save)

    def reserve(self, rows: Sequence[Running], tokens: int) -> list[tuple[int, int, int]] | None:
        """Pages for up to `tokens` more of each: (slot, entry, page) of the new ones; None: there are not so many."""
        wanted = [max(self._pages_for(min(r.most + tokens, r.limit)) - len(r.pages), 0) for r in rows]
        new = self._get(sum(wanted))
        if new is None:
            return None
        deltas, fresh = [], iter(new)
        for r, count in zip(rows, wanted, strict=True):
            for _ in range(count):
                page = next(fresh)
                deltas.append((r.slot, len(r.pages), page))
                r.pages.append(page)
        return deltas

    def preempt(self) -> Running | None:
        """Take slot and pages from the request that came last, and queue it again. Nothing of it may be in flight."""
        running = self.running
        if len(running) < 2:
            return None
        self.leave(last := running[-1])
        self.waiting.appendleft(last)
        return last

    def leave(self, r: Running) -> None:
        """Free all that a request holds. What it has said stays in the prefix cache where that can be resumed from."""
        if r.slot < 0:
            if r in self.waiting:
                self.waiting.remove(r)
            return
        if self.prefix is not None and not self.prefix.recurrent and r.prefilled == r.goal:
            known = len(r.prompt) + len(r.output.tokens) - 1  # the last token is not in the cache
            full = (known - r.behind) // self.page
            self.prefix.insert(r.tokens[: full * self.page], r.pages[:full], r.salt)
        self.slots[r.slot] = None
        self.pages.release(r.pages)
        r.slot, r.pages = -1, []

    def held(self) -> Iterator[list[int]]:
        """The pages of each request that runs."""
        return (r.pages for r in self.slots if r is not None)
