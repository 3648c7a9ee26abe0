"""Pipelines of grain: from documents to rows of packed tokens, in an order that the seed alone decides.

Every process runs the whole pipeline over the tokens, which are small, and keeps its own rows of each batch. So the
batches, and the state that a checkpoint needs to go on exactly, do not depend on the number of processes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import grain
import numpy as np
from grain import experimental

from dflash_jax.errors import InputError
from dflash_jax.text import Tokenizer
from train.chat import conversation
from train.records import JsonLines

Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a drafter learns from.

    A line of the files is an object with `tokens`, of which the first `prompt` are no response, as `dflash train
    responses` writes them, or with chat `messages`, whose replies have to be the target's own.

    Args:
        responses: JSONL files, or folders of such; default: the responses to `prompts`, in out/responses
        prompts: JSONL files of texts or chat messages, for the target to write responses to
        held_out: JSONL files of responses that are not trained on; default: a part of the others
        held_out_count: documents to judge by
        length: tokens of a row; longer documents are cut
        bins: rows that are filled at once: more of them leave less padding
        template: options of the chat template, as enable_thinking: false
        taps: the target's hidden states are made in the step, "online", or once, and read from the "cache" in out/taps
        threads: that read and tokenise
        seed: of the order
    """

    responses: tuple[Path, ...] = ()
    prompts: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    held_out_count: int = 64
    length: int = 3072
    bins: int = 32
    template: dict[str, Any] = dataclasses.field(default_factory=dict)
    taps: Literal["online", "cache"] = "online"
    threads: int = 4
    seed: int = 0


class Documents(Protocol):
    """Random access to documents: `tokens` int32 [T], and `mask` bool [T] of those the target wrote."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of JSON lines, tokenised as they are read and cut to `length`.

    `ends` are the target's end tokens. Without a tokenizer only lines of token ids can be read.
    """

    lines: JsonLines
    length: int
    tokenizer: Tokenizer | None = None
    ends: tuple[int, ...] = ()
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Example:
        tokens, mask = self._read(index)
        return {"tokens": tokens[: self.length], "mask": mask[: self.length]}

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        line = self.lines[index]
        if isinstance(line, dict) and {"tokens", "prompt"} <= line.keys():
            tokens = np.asarray(line["tokens"], np.int32)
            return tokens, np.arange(len(tokens)) >= line["prompt"]
        if isinstance(line, dict) and "messages" in line and self.tokenizer is not None:
            return conversation(self.tokenizer, line["messages"], self.ends, self.template)
        raise InputError(
            f"{self.lines.paths[0].parent}: record {index} is {str(line)[:60]!r}; give objects with `tokens` and "
            "`prompt`, or with chat `messages`"
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the documents, by their indices."""

    documents: Documents
    indices: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.documents[int(self.indices[index])]


def split(documents: Documents, held_out: int, seed: int) -> tuple[Part, Part]:
    """(to learn from, held out): `held_out` of the documents, or a tenth where there are few, drawn by the seed."""
    count = min(held_out, len(documents) // 10)
    order = generator(seed, 5).permutation(len(documents))
    return Part(documents, np.sort(order[count:])), Part(documents, np.sort(order[:count]))


def learnable(example: Example) -> bool:
    """Whether a block can start in the document: two tokens of a response that follow each other."""
    return bool(np.any(example["mask"][1:] & example["mask"][:-1]))


def require_learnable(documents: Documents) -> None:
    """InputError where no document has a response: the pipeline would look for one for ever."""
    if not any(learnable(documents[i]) for i in range(len(documents))):
        raise InputError(
            f"none of {len(documents)} documents has a response of two tokens; give responses, or a larger data.length"
        )


def packed(
    documents: Documents, *, length: int, bins: int, seed: int | None = None, threads: int = 0
) -> grain.IterDataset:
    """Rows of `length` tokens: {tokens, segments, mask, document}, each [length].

    With a seed, every document comes once an epoch, in a new order each time, without end; without one, they come once
    and in order. `segments` numbers the documents of a row 1, 2, ...; 0 is padding. `document` is their index.
    """
    items = grain.MapDataset.range(len(documents))
    if seed is not None:
        items = items.seed(seed).shuffle().repeat()

    def read(index: int) -> Example:
        example = documents[int(index)]
        return {**example, "document": np.full(len(example["tokens"]), index, np.int64)}

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16 * threads)
    examples = items.map(read).filter(learnable).to_iter_dataset(options)
    rows = experimental.FirstFitPackIterDataset(
        examples,
        length_struct=dict.fromkeys(("tokens", "mask", "document"), length),
        num_packing_bins=bins,
        shuffle_bins=seed is not None,
        meta_features=("mask", "document"),
    )

    def tidy(row: Example) -> Example:
        segments = row["tokens_segment_ids"].astype(np.int32)
        return {"tokens": row["tokens"], "segments": segments, "mask": row["mask"], "document": row["document"]}

    return rows.map(tidy)


def batched(
    rows: grain.IterDataset, size: int, finish: Callable[[Batch], Batch] | None = None, ahead: int = 2
) -> grain.IterDataset:
    """Batches of `size` rows. `finish` is done to each by a thread of its own, `ahead` batches before they are used."""
    batches = rows.batch(size, drop_remainder=True)
    if finish is not None:
        batches = batches.map(finish)
    return experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=ahead) if ahead else batches


def whole_batches(documents: Documents, *, length: int, size: int) -> list[Batch]:
    """All documents in order, packed; the last batch is filled with rows of padding."""
    rows = list(packed(documents, length=length, bins=size))
    rows += [{name: np.zeros_like(x) for name, x in rows[0].items()}] * (-len(rows) % size) if rows else []
    return [_stack(rows[i : i + size]) for i in range(0, len(rows), size)]


def _stack(rows: Iterable[Example]) -> Batch:
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def generator(*seed: int) -> np.random.Generator:
    """Random numbers that depend on these seeds alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
