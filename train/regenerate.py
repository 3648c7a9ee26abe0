"""Responses for the drafter's training, written by the target itself: a drafter learns its target, not the corpus.

(Training on the corpus' own text instead costs most of the acceptance: arXiv 2602.06036 gives 2.54 against 6.00.)
Prompts are decoded in batches, each of which becomes one file. A batch depends on the prompts and the seed alone: so a
run that is killed goes on with the batches that are missing, and any number of processes writes the same responses.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dflash_jax
from dflash_jax.compare import acceptance_length
from dflash_jax.decoding.checks import check_width
from dflash_jax.decoding.prefill import capacity
from dflash_jax.errors import InputError
from dflash_jax.pair import Pair
from train.data import generator
from train.processes import Share, barrier
from train.progress import bar
from train.records import MADE_FROM, Response, claim, write_responses
from train.stopping import listen


@dataclasses.dataclass(frozen=True)
class RegenerateConfig:
    """What to let the target write.

    Args:
        drafter: one made for the target, for speed: the responses are the target's own with it or without
        longest: tokens of the longest prompt; longer ones, and those that the target does not take, are left out
        response: tokens of a response; it ends sooner at an end token
        own_prompts: messages that the target makes up itself, to answer beside data.prompts; takes a chat template
        own_openings: how these begin, in turn, as "Write a Python function"
        sampled: fraction of the responses drawn at `temperature`, the others are greedy
        temperature: of those
        stop: ids of tokens that end a response, beside the target's end tokens
        batch: prompts decoded at once
        seed: of the draws; every prompt has its own
    """

    drafter: str | None = None
    longest: int = 2048
    response: int = 2048
    own_prompts: int = 0
    own_openings: tuple[str, ...] = ("",)
    sampled: float = 0.25
    temperature: float = 1.0
    stop: tuple[int, ...] = ()
    batch: int = 64
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that are decoded together: all fit the same compiled shapes."""

    ids: list[int]


def plan(lengths: Sequence[int], config: RegenerateConfig, width: int, positions: int = 0) -> list[Batch]:
    """All prompts that are not too long, those of similar length together: few shapes, and little padding.

    Greedy ones stay apart from drawn ones, so that noise for the vocabulary is made only where it is used.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    longest = min(config.longest, positions - 1) if positions else config.longest
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[i] <= longest:
            size = capacity(lengths[i] + config.response + width)
            groups.setdefault((size, is_sampled(config, i)), []).append(i)
    return [
        Batch(ids[first : first + config.batch])
        for _, ids in sorted(groups.items())
        for first in range(0, len(ids), config.batch)
    ]


def is_sampled(config: RegenerateConfig, id: int) -> bool:
    """Whether the response to this prompt is drawn, or greedy."""
    return bool(generator(config.seed, 4, id).random() < config.sampled)


def write_batch(
    pair: Pair, prompts: Sequence[Sequence[int]], batch: Batch, config: RegenerateConfig
) -> tuple[list[Response], list[int]]:
    """(responses, tokens of each round) of one batch, filled up to the size that is compiled."""
    ids = batch.ids + batch.ids[-1:] * (min(config.batch, len(prompts)) - len(batch.ids))
    made = dflash_jax.generate(
        pair,
        [prompts[i] for i in ids],
        max_new_tokens=config.response,
        temperature=[config.temperature if is_sampled(config, i) else 0.0 for i in ids],
        seed=[int(generator(config.seed, 3, i).integers(2**32)) for i in ids],
        stop=config.stop,
    )
    pairs = list(zip(batch.ids, made, strict=False))  # without the filling
    responses = [Response(i, len(prompts[i]), [*prompts[i], *one.tokens], one.finish_reason) for i, one in pairs]
    return responses, [count for _, one in pairs for count in one.acceptance_lengths]


def fingerprint(prompts: Sequence[Sequence[int]]) -> str:
    """Of the prompts' tokens."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.asarray([len(prompt), *prompt], np.int64).tobytes())
    return digest.hexdigest()[:16]


def settings(config: RegenerateConfig, width: int) -> dict[str, Any]:
    """Return what responses depend on, beside the prompts; without what older runs could not set."""
    given = dataclasses.asdict(config).items()
    return {name: value for name, value in given if value != () and not name.startswith("own_")} | {"width": width}


def regenerate(
    pair: Pair, prompts: Sequence[Sequence[int]], config: RegenerateConfig, folder: Path, what: str = "responses"
) -> bool:
    """Writes responses to all prompts (token ids) into `folder`, a JSONL file a batch; False if it was stopped first.

    Goes on where an earlier run stopped. InputError for a folder of other prompts or settings, or prompts that are all
    too long.
    """
    width = check_width(pair, True, None)
    batches = plan(list(map(len, prompts)), config, width, pair.target.config.max_position)
    if not batches:
        raise InputError(
            f"none of {len(prompts)} prompts has up to {config.longest} tokens, or as many as the target takes; "
            "give shorter ones, or a larger longest"
        )
    facts = settings(config, width) | {"prompts": fingerprint(prompts)}
    claim(folder / MADE_FROM, facts, what)
    share = Share.of(pair.mesh)
    for k, responses in _written(pair, prompts, config, batches, share, folder, what):
        if share.writes:
            write_responses(folder / f"{k:06d}.jsonl", responses)
    barrier("responses")
    return all((folder / f"{k:06d}.jsonl").exists() for k in range(len(batches)))


def _written(
    pair: Pair, prompts: Sequence[Sequence[int]], config: RegenerateConfig, batches: list[Batch], share: Share,
    folder: Path, what: str,
) -> Iterator[tuple[int, list[Response]]]:  # fmt: skip
    """(number, responses) of this process' missing batches, with a progress bar, until all are there or SIGTERM."""
    mine = share.pieces(len(batches))
    missing = [k for k in mine if not (folder / f"{k:06d}.jsonl").exists()]
    barrier("missing responses")  # all have looked before one of them writes
    start, tokens, rounds = time.monotonic(), 0, []
    with listen(together=False) as stop, bar(what, sum(len(batches[k].ids) for k in mine)) as show:
        done = sum(len(batches[k].ids) for k in mine if k not in missing)
        show(done, "")
        for turn, k in enumerate(missing):
            responses, counts = write_batch(pair, prompts, batches[k], config)
            yield k, responses
            tokens += sum(len(response.tokens) - response.prompt for response in responses)
            rounds += counts
            done += len(responses)
            speed = tokens * share.count / (time.monotonic() - start)  # of all processes
            show(done, f"{speed:.0f} tokens/s, acceptance length {acceptance_length(rounds):.2f}")
            if stop(turn + 1):
                return
