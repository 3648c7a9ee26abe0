"""The target's taps on disk, made once: then a training step does not run the target.

They are kept document by document, so that they serve any packing of the documents into rows. A file holds those of
some documents one after the other; it is written whole or not at all, and any number of processes shares the work.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.decoding.prefill import capacity
from dflash_jax.models.target import Target
from dflash_jax.pair import Pair
from dflash_jax.text import Tokenizer
from train.data import Batch, Documents, learnable
from train.processes import Share, barrier
from train.progress import bar
from train.records import MADE_FROM, claim
from train.regenerate import fingerprint
from train.stopping import listen

PER_FILE = 128  # documents


@dataclasses.dataclass(frozen=True)
class TapCache:
    """The taps of documents, [length, taps * D] each, as the target's own dtype."""

    folder: Path

    def _file(self, k: int) -> Path:
        return self.folder / f"{k:06d}.npy"

    @functools.lru_cache(maxsize=256)  # noqa: B019  # open files of a cache that lives as long as the run
    def _open(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        taps = np.load(self._file(k), mmap_mode="r")
        return taps.view(ml_dtypes.bfloat16) if taps.dtype == np.uint16 else taps, np.load(self._ends(k))

    def _ends(self, k: int) -> Path:
        return self.folder / f"{k:06d}.ends.npy"

    def __getitem__(self, document: int) -> np.ndarray:
        taps, ends = self._open(document // PER_FILE)
        place = document % PER_FILE
        return taps[ends[place - 1] if place else 0 : ends[place]]

    def missing(self, documents: int) -> list[int]:
        return [k for k in range(-(-documents // PER_FILE)) if not self._file(k).exists()]

    def write(self, k: int, taps: Sequence[np.ndarray]) -> None:
        whole = np.concatenate(taps)
        np.save(self._ends(k), np.cumsum([len(x) for x in taps]))
        part = self._file(k).with_suffix(".part.npy")
        np.save(part, whole.view(np.uint16) if whole.dtype == ml_dtypes.bfloat16 else whole)
        part.replace(self._file(k))

    def add(self, batch: Batch) -> Batch:
        """The batch of packed documents, with their `taps` [B, T, taps * D] beside them; 0 on padding."""
        document, segments = batch["document"], batch["segments"]
        taps = None
        for b, row in enumerate(segments):
            for segment in range(1, int(row.max(initial=0)) + 1):
                places = np.flatnonzero(row == segment)
                found = self[int(document[b, places[0]])]
                if taps is None:
                    taps = np.zeros((*segments.shape, found.shape[-1]), found.dtype)
                taps[b, places] = found[: len(places)]
        if taps is None:  # nothing but padding, which still has a shape
            one = self[0]
            taps = np.zeros((*segments.shape, one.shape[-1]), one.dtype)
        return {**batch, "taps": taps}


@functools.partial(jax.jit, static_argnames=("graph", "tap_ids"))
def _taps(
    graph: nnx.GraphDef, weights: nnx.State, tokens: Int[Array, "B T"], tap_ids: tuple[int, ...]
) -> Float[Array, "B T CD"]:
    return nnx.merge(graph, weights).sequence(tokens, tap_ids=tap_ids).taps


def make_taps(
    target: Target, tap_ids: tuple[int, ...], documents: Documents, folder: Path, mesh: Any, batch: int
) -> TapCache | None:
    """The cache in `folder`, with what is missing in it made; None if it was stopped meanwhile.

    InputError for a folder that holds the taps of other documents, layers or another target.
    """
    cache = TapCache(folder)
    facts = {
        "tap_ids": list(tap_ids),
        "target": target.config.to_dict(),
        "documents": fingerprint([documents[i]["tokens"].tolist() for i in range(len(documents))]),
    }
    claim(folder / MADE_FROM, facts, "taps")
    share = Share.of(mesh)
    missing = [k for k in cache.missing(len(documents)) if k % share.count == share.index]
    barrier("missing taps")
    pair = Pair(target, None, Tokenizer(None, folder), mesh)
    stopped = False
    with listen(together=False) as stop, bar("taps", len(missing)) as show:
        for turn, k in enumerate(missing):
            numbers = range(k * PER_FILE, min((k + 1) * PER_FILE, len(documents)))
            made = dict(_of_documents(pair, tap_ids, documents, numbers, batch))
            if share.writes:
                cache.write(k, [made[i] for i in numbers])
            show(turn + 1, f"{len(numbers)} documents a file")
            stopped = stop(turn + 1)
            if stopped:
                break
    barrier("taps")
    return None if stopped or cache.missing(len(documents)) else cache


def _of_documents(
    pair: Pair, tap_ids: tuple[int, ...], documents: Documents, numbers: range, size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(document, taps), made in batches of documents of similar length; nothing for those that are never read."""
    graph, weights = nnx.split(pair.target)
    width = len(tap_ids) * pair.target.config.hidden_size
    examples = {i: documents[i] for i in numbers}
    order = sorted((i for i in numbers if learnable(examples[i])), key=lambda i: len(examples[i]["tokens"]))
    for i in numbers:
        if i not in order:
            yield i, np.zeros((0, width), pair.target.embed.embedding.dtype)
    size += -size % pair.batch_multiple
    for first in range(0, len(order), size):
        here = order[first : first + size]
        tokens = np.zeros((size, capacity(len(examples[here[-1]]["tokens"]))), np.int32)
        for row, i in zip(tokens, here, strict=False):
            row[: len(examples[i]["tokens"])] = examples[i]["tokens"]
        with pair.on_mesh():
            made = pair.get(_taps(graph, weights, pair.put(tokens), tap_ids))
        for row, i in zip(made, here, strict=False):
            yield i, row[: len(examples[i]["tokens"])]
