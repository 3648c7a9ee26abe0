"""Batches that are a pure function of the seed and the step, so that a resumed run needs no iterator state."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase


def pack(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> np.ndarray:
    """All documents in one row of token ids, each followed by the end token."""
    rows = tokenizer(list(texts))["input_ids"]
    end = tokenizer.eos_token_id
    return np.concatenate([np.asarray([*row, end], np.int32) for row in rows])  # type: ignore[union-attr]


def generator(*seed: int) -> np.random.Generator:
    """Random numbers that depend on these seeds alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


@functools.lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` items in this epoch."""
    return generator(seed, epoch).permutation(count)


def shuffled(count: int, batch_size: int, seed: int, step: int) -> list[tuple[int, int]]:
    """(epoch, item) for each place of the batch: every item once an epoch, in a new order each time."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [(place // count, int(permutation(count, seed, place // count)[place % count])) for place in places]


@dataclasses.dataclass(frozen=True)
class PackedWindows:
    """Windows of `length + 1` tokens of packed documents: inputs are [:-1], labels are [1:].

    The windows' common offset moves with every epoch, so that documents are not always cut at the same places.
    """

    tokens: np.ndarray
    length: int
    batch_size: int
    seed: int

    @property
    def count(self) -> int:
        return (len(self.tokens) - 1) // self.length - 1

    def window(self, epoch: int, item: int) -> np.ndarray:
        start = item * self.length + int(generator(self.seed, epoch, 1).integers(self.length))
        return self.tokens[start : start + self.length + 1]

    def batch(self, step: int) -> np.ndarray:
        """[batch_size, length + 1] token ids of this step."""
        return np.stack([self.window(*place) for place in shuffled(self.count, self.batch_size, self.seed, step)])


def fixed_windows(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """[count, length + 1] windows spread evenly over `tokens`, for the held-out loss."""
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    return np.stack([tokens[start : start + length + 1] for start in starts])
