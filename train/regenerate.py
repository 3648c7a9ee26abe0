"""Responses for the drafter's training, written by the target itself: a drafter learns its target, not the corpus.

(Training on the corpus' own text instead costs most of the acceptance: arXiv 2602.06036 gives 2.54 against 6.00.)
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dflash_jax.cache import TargetCache
from dflash_jax.models.target import Target
from train.data import generator
from train.step import Pytree


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
    """Prompts and what the target made of them: row b is a prompt up to `prompts[b]` and a response up to `lengths[b]`."""

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
    def load(cls, paths: Sequence[Path]) -> "Responses":
        """The files' rows one after the other."""
        files = [np.load(path) for path in paths]
        return cls(**{f.name: np.concatenate([file[f.name] for file in files]) for f in dataclasses.fields(cls)})


def cut_prompts(
    documents: Sequence[np.ndarray], starts: np.ndarray, config: RegenerateConfig
) -> tuple[np.ndarray, np.ndarray]:
    """`count` prompts [n, longest] and their lengths. `starts[id]` says whether token `id` begins a line."""
    rng = generator(config.seed, 2)
    sizes = np.array([len(document) for document in documents], float)
    prompts = np.zeros((config.count, config.longest), np.int32)
    lengths = rng.integers(config.shortest, config.longest + 1, config.count)
    for row, (document, length) in enumerate(
        zip(rng.choice(len(documents), config.count, p=sizes / sizes.sum()), lengths)
    ):
        tokens = documents[document]
        lines = np.flatnonzero(starts[tokens[: max(1, len(tokens) - config.longest)]])
        first = int(rng.choice(lines)) + 1 if len(lines) else 0
        cut = tokens[first : first + length]
        lengths[row] = len(cut)
        prompts[row, : len(cut)] = cut
    return prompts, lengths.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("graph", "response", "end"))
def decode(
    params: Pytree,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    temperature: Float[Array, "B"],
    key: Key[Array, ""],
    *,
    graph: nnx.GraphDef,
    response: int,
    end: int,
) -> Int[Array, "B response"]:
    """Plain decoding, all rows in step: greedy where the temperature is 0. Behind the end token a row repeats it."""
    model = nnx.merge(graph, params)
    rows, longest = prompts.shape
    cache = TargetCache.empty(model.config, rows, longest + response, 1, model.embed.embedding.dtype)
    out, cache = model.prefill(prompts, lengths, cache)
    last = jnp.take_along_axis(out.hidden, lengths[:, None, None] - 1, 1)[:, 0]

    def choose(hidden: Array, key: Array) -> Array:
        logits = model.head(hidden)
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6)[:, None])
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)

    def step(carry: tuple[Array, TargetCache], key: Array) -> tuple[tuple[Array, TargetCache], Array]:
        token, cache = carry
        out = model.verify(token[:, None], cache)
        cache = cache.commit(out.layers, jnp.ones(rows, jnp.int32))
        following = jnp.where(token == end, end, choose(out.hidden[:, 0], key))
        return (following, cache), token

    keys = jax.random.split(key, response + 1)
    _, tokens = jax.lax.scan(step, (choose(last, keys[0]), cache), keys[1:])
    return tokens.T


def assemble(prompts: np.ndarray, lengths: np.ndarray, responses: np.ndarray, end: int) -> Responses:
    """Each response right behind its prompt, up to and including its first end token."""
    finished = responses == end
    size = np.where(finished.any(1), finished.argmax(1) + 1, responses.shape[1])
    tokens = np.pad(prompts, ((0, 0), (0, responses.shape[1])))
    for row, (length, count) in enumerate(zip(lengths, size, strict=True)):
        tokens[row, length : length + count] = responses[row, :count]
    return Responses(tokens, lengths.astype(np.int32), (lengths + size).astype(np.int32))


def regenerate(
    target: Target,
    documents: Sequence[np.ndarray],
    starts: np.ndarray,
    end: int,
    config: RegenerateConfig,
    folder: Path,
) -> Responses:
    """All responses; one file a batch, so that a stopped run goes on where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, lengths = cut_prompts(documents, starts, config)
    graph, params = nnx.split(target)
    firsts = range(0, config.count, config.batch)
    paths = [folder / f"{first:06d}.npz" for first in firsts]
    for first, path in rich.progress.track(list(zip(firsts, paths, strict=True)), "responses"):
        if path.exists():
            continue
        rows = slice(first, first + config.batch)
        size = len(lengths[rows])
        temperature = (np.arange(size) < round(config.sampled * size)).astype(np.float32)
        key = jax.random.fold_in(jax.random.key(config.seed), first)
        made = decode(
            params, prompts[rows], lengths[rows], temperature, key, graph=graph, response=config.response, end=end
        )
        assemble(prompts[rows], lengths[rows], np.asarray(made), end).save(path)
    return Responses.load(paths)
