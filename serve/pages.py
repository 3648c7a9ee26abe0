"""Pages of the cache: who holds which, and how many the memory has room for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dflash_jax.errors import InputError


class Pages:
    """Page ids, each held by any number of sequences, and perhaps kept by the prefix cache beside them.

    A page that no sequence holds is free, or idle where the prefix cache keeps it.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(reversed(range(count)))
        self._holders = [0] * count
        self._kept = [False] * count
        self.idle = 0  # pages that only the prefix cache has

    @property
    def free(self) -> int:
        """How many can be taken at once."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """New pages, each with one holder. ValueError for more than are free."""
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One holder more of each; somebody holds or keeps them already."""
        for page in pages:
            self.idle -= self._kept[page] and not self._holders[page]
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less of each."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is released and nobody holds it")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._let_go(page)

    def _let_go(self, page: int) -> None:
        if self._kept[page]:
            self.idle += 1
        else:
            self._free.append(page)

    def keep(self, page: int) -> None:
        """The prefix cache keeps a page that somebody holds."""
        self._kept[page] = True

    def drop(self, page: int) -> None:
        """The prefix cache keeps an idle page no longer."""
        if self._holders[page] or not self._kept[page]:
            raise ValueError(f"page {page} is dropped and not idle")
        self._kept[page] = False
        self.idle -= 1
        self._free.append(page)

    def held(self, page: int) -> bool:
        """Whether some sequence holds the page."""
        return self._holders[page] > 0

    def check(self, sequences: Iterable[Sequence[int]], kept: Iterable[int]) -> None:
        """AssertionError unless these sequences and these kept pages are all there is."""
        holders = [0] * self.count
        for pages in sequences:
            assert len(set(pages)) == len(pages), "a sequence holds a page twice"
            for page in pages:
                holders[page] += 1
        kept_pages = list(kept)
        assert len(set(kept_pages)) == len(kept_pages), "a page is kept twice"
        assert holders == self._holders, "holders are not the sequences"
        assert set(kept_pages) == {page for page, is_kept in enumerate(self._kept) if is_kept}, "kept pages differ"
        assert self.idle == sum(not holders[page] for page in kept_pages), "idle pages are miscounted"
        unused = {page for page in range(self.count) if not holders[page] and not self._kept[page]}
        assert sorted(self._free) == sorted(unused), "free pages are not those that nobody has"


@dataclass(frozen=True)
class Memory:
    """Bytes of all that the engine keeps on each device, without what a program needs while it runs."""

    weights: int
    slots: int  # of all slots: recurrent state, pending rows, tokens, settings, page tables
    checkpoints: int  # recurrent states that the prefix cache keeps
    page: int  # one page of all layers, target's and drafter's
    pages: int  # how many pages

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.slots + self.checkpoints + self.pages * self.page

    def pages_within(self, budget: int, least: int) -> int:
        """How many pages fit into `budget` bytes. InputError for fewer than `least`."""
        fixed = self.weights + self.slots + self.checkpoints
        pages = max(budget - fixed, 0) // self.page
        if pages < least:
            raise InputError(
                f"the memory budget is {budget / 2**20:.0f} MiB: weights take {self.weights / 2**20:.0f}, "
                f"slots {self.slots / 2**20:.0f}, checkpoints {self.checkpoints / 2**20:.0f} and the {least} pages of "
                f"one longest request {least * self.page / 2**20:.0f}; give more, or fewer slots, or a smaller "
                "max_length"
            )
        return pages
