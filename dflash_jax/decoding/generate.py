"""`generate` and `stream`: prefill, then rounds on the device, seen by the host every so many rounds."""

import itertools
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dflash_jax.decoding.output import Generation, Output, Piece
from dflash_jax.decoding.prefill import capacity, chunk_size, prefill
from dflash_jax.decoding.round import DecodeState, decode_round
from dflash_jax.decoding.sampling import Sampling
from dflash_jax.errors import InputError
from dflash_jax.pair import Pair
from dflash_jax.text import Prompt

ROUNDS_PER_DISPATCH = 16  # of a stream, or where stop strings have to be looked for


# XLA's newer library of products for the CPU (YNNPACK) is slower for the few rows of a round: 2.7 against 2.1 ms for 8
# rows of the embedded pair, 0.81 against 0.68 for one. Vectors of 512 bits, where the CPU has them, and maxima that do
# not look for NaN save 5% each. Other platforms do not look at these options.
PRODUCTS = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_prefer_vector_width": "512",
    "xla_cpu_enable_fast_min_max": True,
}


@partial(jax.jit, static_argnames=("graph", "width"), donate_argnames=("state",), compiler_options=PRODUCTS)
def run_rounds(
    graph: nnx.GraphDef,
    weights: nnx.State,
    state: DecodeState,
    sampling: Sampling | None,
    rounds: Int[Array, ""],
    width: int,
) -> DecodeState:
    """Up to `rounds` rounds in one dispatch; it ends early when every request is finished."""
    target, drafter = nnx.merge(graph, weights)

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < rounds) & ~jnp.all(carry[1].finished)

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, decode_round(target, drafter, carry[1], sampling, width)

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))[1]


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
    width: int | None = None,
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
        width: rows a round, the anchor included, 1 to the drafter's block size, which is the default.

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
    run = _Run(pair, prompts, max_new_tokens, settings, stop, draft, width, logprobs)
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
    width: int | None = None,
    **settings: Any,
) -> Generator[Piece, None, Generation]:
    """Complete one prompt and yield pieces as rounds finish; returns the `Generation`. Arguments as for `generate`."""
    return _pieces(_Run(pair, [prompt], max_new_tokens, settings, stop, draft, width, logprobs))


def _pieces(run: "_Run") -> Generator[Piece, None, Generation]:
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


class _Run:
    """One batch on its way: its arrays on the device, and on the host what has been seen of its output."""

    def __init__(
        self,
        pair: Pair,
        prompts: list[Prompt],
        max_new: int,
        settings: dict,
        stop: Any,
        draft: bool,
        width: int | None,
        logprobs: int | None = None,
    ):
        config = pair.target.config
        if isinstance(max_new, bool) or not isinstance(max_new, (int, np.integer)) or max_new < 1:
            raise InputError(f"max_new_tokens is {max_new!r}; give a whole number of at least 1")
        ids = [pair.tokenizer.encode(prompt) for prompt in prompts]
        self.stop_texts, stop_ids = split_stops(stop, config.vocab_size)
        self.width = check_width(pair, draft, width)
        self.graph, self.weights = pair.split if self.width > 1 else pair.split_target
        self.pair, spare = pair, -len(ids) % pair.batch_multiple
        packed = Sampling.pack(len(ids), config.vocab_size, logprobs=logprobs, **settings)
        lengths = np.array([len(i) for i in ids], np.int32)
        longest = config.max_position or np.iinfo(np.int32).max
        if lengths.max() >= longest:
            raise InputError(
                f"a prompt has {lengths.max()} tokens and the model takes {longest}; give at most {longest - 1}"
            )
        limit = np.minimum(lengths + int(max_new), longest).astype(np.int32)
        tokens = np.zeros((len(ids), capacity(int(limit.max()) + self.width)), np.int32)
        for row, prompt in zip(tokens, ids, strict=True):
            row[: len(prompt)] = prompt
        ends = sorted({*config.eos_token_ids, *stop_ids})
        stops = np.full((len(ids), max(8, len(ends))), -1, np.int32)
        stops[:, : len(ends)] = ends
        least = packed.min_tokens.tolist()
        check_min_tokens(max(least), max_new, len(ends), config.vocab_size)
        sampling = None if packed.plan.neutral else packed
        self.outputs = [
            Output(pair.tokenizer, int(n), self.stop_texts, set(ends), min_tokens=m, logprobs=logprobs)
            for n, m in zip(lengths, least, strict=True)
        ]
        self.chunk = chunk_size(int(lengths.max()))
        inputs = jax.tree.map(lambda x: _with_spare(x, spare), (tokens, lengths, limit, stops, sampling))
        inputs[2][len(ids) :] = 0  # spare rows are finished before they start
        *self.inputs, self.sampling = pair.put(inputs)

    def dispatches(self, rounds: Iterator[int]) -> Iterator[None]:
        """Prefill, then dispatches of rounds until all is finished; the host sees the output after each."""
        with self.pair.on_mesh():
            state = prefill(self.graph, self.weights, *self.inputs, self.sampling, self.width, self.chunk)
        while True:
            done = self._look(state)
            yield
            if done:
                return
            count = jax.device_put(np.int32(next(rounds)))
            with self.pair.on_mesh():
                state = run_rounds(self.graph, self.weights, state, self.sampling, count, self.width)

    def _look(self, state: DecodeState) -> bool:
        found = None if state.logprobs is None else state.logprobs.rows
        tokens, known, counts, rounds, finished, found = self.pair.get(
            (state.tokens, state.known, state.counts, state.rounds, state.finished, found)
        )
        for i, output in enumerate(self.outputs):
            own = None if found is None else (found.own[i], found.top[i], found.ids[i])
            output.update(tokens[i, : known[i]], counts[i, : rounds[i]], own)
        return all(f or o.transcript.stopped for f, o in zip(finished[: len(self.outputs)], self.outputs, strict=True))


def _with_spare(x: Any, spare: int) -> np.ndarray:
    """A batch with its last row repeated."""
    return np.concatenate([np.asarray(x), *[np.asarray(x)[-1:]] * spare])


def check_min_tokens(least: int, max_new: int, ends: int, vocab: int) -> None:
    """InputError for a least length that cannot be reached."""
    if least > max_new:
        raise InputError(f"min_tokens is {least}, and max_new_tokens {max_new}; give at most as many")
    if least and ends >= vocab:
        raise InputError(f"min_tokens is {least}, and each of the {vocab} tokens is a stop token; leave some out")


def split_stops(stop: Any, vocab: int) -> tuple[list[str], list[int]]:
    """Stop texts and stop ids."""
    entries = list(stop) if isinstance(stop, (list, tuple, set, frozenset, np.ndarray)) else [stop]
    for entry in entries:
        if isinstance(entry, str) and entry:
            continue
        if isinstance(entry, bool) or not isinstance(entry, (int, np.integer)) or not 0 <= entry < vocab:
            raise InputError(
                f"stop holds {entry!r}; give texts of at least one character, or ids from 0 to {vocab - 1}"
            )
    return [e for e in entries if isinstance(e, str)], [int(e) for e in entries if not isinstance(e, str)]


def check_width(pair: Pair, draft: bool, width: int | None) -> int:
    """Rows of a round: 1 for plain decoding, else as asked for or the drafter's block."""
    if pair.drafter is None or not draft:
        if width not in (None, 1):
            raise InputError(f"width is {width}, and there is no drafter at work; leave width out, or give a drafter")
        return 1
    block = pair.drafter.config.block_size
    if width is None:
        return block
    if isinstance(width, bool) or not isinstance(width, (int, np.integer)) or not 1 <= width <= block:
        raise InputError(f"width is {width!r}; give a whole number from 1 to {block}, the drafter's block size")
    return int(width)
