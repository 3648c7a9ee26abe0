"""Responses for the drafter's training, written by the target itself: a drafter learns its target, not the corpus.

(Training on the corpus' own text instead costs most of the acceptance: arXiv 2602.06036 gives 2.54 against 6.00.)
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rich.progress
from jaxtyping import Int

import dflash_jax
from dflash_jax.pair import Pair
from train.data import generator


@dataclasses.dataclass(frozen=True)
class RegenerateConfig:
    """What to let the target write.

    Args:
        count: prompts, cut from the documents at random line starts
        shortest: tokens of the shortest prompt
        longest: tokens of the longest prompt
        response: tokens of a response; it ends sooner at the end token
        sampled: fraction of the responses drawn at temperature 1, the others are greedy
        batch: prompts decoded at once
        seed: of the cuts and of the draws
    """

    count: int = 3072
    shortest: int = 16
    longest: int = 96
    response: int = 256
    sampled: float = 0.25
    batch: int = 64
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Responses:
    """Prompts and what the target made of them: a row is prompt up to `prompts[b]`, response up to `lengths[b]`."""

    tokens: Int[np.ndarray, "n T"]
    prompts: Int[np.ndarray, "n"]
    lengths: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.tokens)

    def loss_mask(self) -> np.ndarray:
        """[n, T]: the positions of the responses."""
        positions = np.arange(self.tokens.shape[1])
        return (positions >= self.prompts[:, None]) & (positions < self.lengths[:, None])

    def save(self, path: Path) -> None:
        """Whole or not at all, so that a killed run leaves no broken file."""
        part = path.with_suffix(".part.npz")
        np.savez(part, **dataclasses.asdict(self))
        part.rename(path)

    @classmethod
    def build(cls, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> "Responses":
        """From sequences of any length, of which the first `prompts[b]` tokens are the prompt."""
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for into, row in zip(tokens, rows, strict=True):
            into[: len(row)] = row
        return cls(tokens, np.asarray(prompts, np.int32), np.array([len(row) for row in rows], np.int32))

    @classmethod
    def load(cls, paths: Sequence[Path], length: int) -> "Responses":
        """The files' rows one after the other, padded to `length`."""
        files = [np.load(path) for path in paths]
        tokens = [np.pad(file["tokens"], ((0, 0), (0, length - file["tokens"].shape[1]))) for file in files]
        prompts, lengths = ([file[name] for file in files] for name in ("prompts", "lengths"))
        return cls(np.concatenate(tokens), np.concatenate(prompts), np.concatenate(lengths))


def cut_prompts(documents: Sequence[np.ndarray], starts: np.ndarray, config: RegenerateConfig) -> list[list[int]]:
    """`count` prompts that begin at lines; `starts[id]` says whether token `id` ends with a line's beginning."""
    rng = generator(config.seed, 2)
    sizes = np.array([len(document) for document in documents], float)
    chosen = rng.choice(len(documents), config.count, p=sizes / sizes.sum())
    lengths = rng.integers(config.shortest, config.longest + 1, config.count)
    prompts = []
    for tokens, length in zip((documents[i] for i in chosen), lengths, strict=True):
        breaks = np.flatnonzero(starts[tokens[: max(0, len(tokens) - config.longest)]])
        first = int(rng.choice(breaks)) + 1 if len(breaks) else 0
        prompts.append(tokens[first : first + length].tolist())
    return prompts


def write_responses(pair: Pair, prompts: list[list[int]], temperature: np.ndarray, seed: int, length: int) -> Responses:
    """One batch of plain decoding; each response lies right behind its prompt."""
    seeds = generator(seed, 3).integers(2**32, size=len(prompts), dtype=np.uint32)
    made = dflash_jax.generate(
        pair, prompts, max_new_tokens=length, temperature=temperature.tolist(), seed=seeds.tolist(), draft=False
    )
    rows = [[*prompt, *generation.tokens] for prompt, generation in zip(prompts, made, strict=True)]
    return Responses.build(rows, [len(prompt) for prompt in prompts])


def regenerate(
    pair: Pair, documents: Sequence[np.ndarray], starts: np.ndarray, config: RegenerateConfig, folder: Path
) -> Responses:
    """All responses; one file a batch, so that a stopped run goes on where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = cut_prompts(documents, starts, config)
    paths = []
    for first in rich.progress.track(range(0, config.count, config.batch), "responses"):
        paths.append(folder / f"{first:06d}.npz")
        if paths[-1].exists():
            continue
        batch = prompts[first : first + config.batch]
        temperature = (np.arange(len(batch)) < round(config.sampled * len(batch))).astype(float)
        write_responses(pair, batch, temperature, config.seed + first, config.response).save(paths[-1])
    return Responses.load(paths, config.longest + config.response)
