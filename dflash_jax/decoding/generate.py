"""Completing prompts: `generate` and `stream`."""

import itertools
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from dflash_jax.decoding.output import Generation, Piece
from dflash_jax.decoding.run import Run
from dflash_jax.decoding.width import Width
from dflash_jax.errors import InputError
from dflash_jax.pair import Pair
from dflash_jax.text import Prompt

ROUNDS_PER_DISPATCH = 16  # of a stream, or where stop strings have to be looked for


def generate(
    pair: Pair,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: Any = 0.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    presence_penalty: Any = 0.0,
    frequency_penalty: Any = 0.0,
    logit_bias: Any = None,
    min_tokens: Any = 0,
    seed: Any = 0,
    stop: Any = (),
    logprobs: int | None = None,
    draft: bool = True,
    width: Width | None = None,
) -> list[Generation]:
    """Complete prompts. The output is the target's own, with the drafter or without it.

    Args:
        prompts: each a text, token ids, or chat messages; all are decoded as one batch.
        max_new_tokens: most tokens to generate for each prompt.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed:
            one value for all prompts, or one for each (see `Sampling.build`). Temperature 0 is greedy.
        min_tokens: how many tokens there have to be before a stop token can be chosen or a stop text is looked for, one
            for all prompts or one for each.
        stop: texts and token ids that end a generation, beside the model's own end tokens.
        logprobs: how many likely tokens to name beside each one, with log-probabilities (see `TokenLogprobs`).
        draft: False decodes plainly.
        width: rows a round, the anchor included, 1 to the drafter's block size, which is the default. "adaptive": what
            this and earlier calls have measured to pay, down to plain decoding; the first calls compile three widths.
            What is drawn with a DFlash 2 drafter then depends on the clock, beside the seed.

    Raises:
        InputError: an empty or too long prompt, ids outside the vocabulary, or a setting out of its range.
    """
    prompts = as_batch(prompts)
    settings = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "logit_bias": logit_bias,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "min_tokens": min_tokens, "seed": seed,
    }  # fmt: skip
    if not prompts:
        return []
    run = Run(pair, prompts, max_new_tokens, settings, stop, draft, width, logprobs)
    rounds = ROUNDS_PER_DISPATCH if run.stop_texts else np.iinfo(np.int32).max
    for _ in run.dispatches(itertools.repeat(rounds)):
        pass
    return [output.generation() for output in run.outputs]


def stream(
    pair: Pair,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    stop: Any = (),
    logprobs: int | None = None,
    draft: bool = True,
    width: Width | None = None,
    **settings: Any,
) -> Generator[Piece, None, Generation]:
    """Complete one prompt and yield pieces as rounds finish; returns the `Generation`. Arguments as for `generate`."""
    return _pieces(Run(pair, [prompt], max_new_tokens, settings, stop, draft, width, logprobs))


def _pieces(run: "Run") -> Generator[Piece, None, Generation]:
    output = run.outputs[0]
    growing = itertools.chain([1, 2, 4, 8], itertools.repeat(ROUNDS_PER_DISPATCH))  # the first words at once
    for _ in run.dispatches(growing):
        if piece := output.piece():
            yield piece
    generation = output.generation()
    if piece := output.piece():
        yield piece
    return generation


def as_batch(prompts: Any) -> list[Prompt]:
    """A list of prompts; a single text, list of ids or list of messages is a batch of one."""
    if not hasattr(prompts, "__len__"):
        kind = type(prompts).__name__
        raise InputError(f"prompts are a {kind}; give a text, token ids, chat messages, or a list of such")
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], (int, np.integer, dict))):
        return [prompts]
    return list(prompts)
