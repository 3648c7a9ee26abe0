"""A target's training data: windows of one long row of packed documents."""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from train.data import generator


def pack(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> np.ndarray:
    """All documents in one row of token ids, each followed by the end token."""
    rows = tokenizer(list(texts))["input_ids"]
    end = tokenizer.eos_token_id
    return np.concatenate([np.asarray([*row, end], np.int32) for row in rows])  # type: ignore[union-attr]


@dataclasses.dataclass(frozen=True)
class PackedWindows:
    """Windows of `length + 1` tokens of packed documents: inputs are [:-1], labels are [1:].

    The windows' common offset moves with every epoch, so that documents are not always cut at the same places.
    """

    tokens: np.ndarray
    length: int
    seed: int

    @property
    def count(self) -> int:
        return (len(self.tokens) - 1) // self.length - 1

    def window(self, epoch: int, item: int) -> np.ndarray:
        start = item * self.length + int(generator(self.seed, epoch, 1).integers(self.length))
        return self.tokens[start : start + self.length + 1]

    def batches(self, size: int) -> grain.IterDataset:
        """Batches [size, length + 1] without end: every window once an epoch, in a new order each time."""
        items = grain.MapDataset.range(self.count).seed(self.seed).shuffle().repeat()
        windows = items.map_with_index(lambda place, item: self.window(place // self.count, int(item)))
        return windows.batch(size).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))


def fixed_windows(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """[count, length + 1] windows spread evenly over `tokens`, for the held-out loss."""
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    return np.stack([tokens[start : start + length + 1] for start in starts])
