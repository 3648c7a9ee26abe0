"""One batch from its prompts to its end: a prefill, and dispatches of rounds."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dflash_jax.decoding.checks import check_min_tokens, check_width, split_stops
from dflash_jax.decoding.observe import catch_up
from dflash_jax.decoding.output import Output
from dflash_jax.decoding.prefill import capacity, chunk_size, prefill
from dflash_jax.decoding.round import DecodeState, decode_round
from dflash_jax.decoding.sampling import Sampling
from dflash_jax.decoding.width import MOST_ROUNDS, Width
from dflash_jax.errors import InputError
from dflash_jax.pair import Pair
from dflash_jax.text import Prompt

# Vectors of 512 bits, where the CPU has them, and maxima that do not look for NaN save 5% each. XLA's newer library of
# products for the CPU (YNNPACK) is slower for few sequences: 2.7 against 2.1 ms for 8 rows of the embedded pair, 0.81
# against 0.68 for one; of 8 sequences 13.4 against 14.7 ms and 3.8 against 3.7, of 16 20.7 against 23.2 and 5.2 against
# 5.1, of 64 plain ones 19.4 against 23.9. Other platforms ignore these options.
MANY_PRODUCTS = {"xla_cpu_prefer_vector_width": "512", "xla_cpu_enable_fast_min_max": True}
PRODUCTS = MANY_PRODUCTS | {"xla_cpu_experimental_ynn_fusion_type": ""}
MANY = 8  # sequences in a round, from which on `MANY_PRODUCTS` are quicker


def rounds_for(sequences: int) -> Any:
    """The compiled `run_rounds` for so many sequences."""
    return _of_few if sequences < MANY else _of_many


def run_rounds(
    graph: nnx.GraphDef,
    weights: nnx.State,
    state: DecodeState,
    sampling: Sampling | None,
    rounds: Int[Array, ""],
    width: int,
) -> DecodeState:
    """Up to `rounds` rounds in one dispatch; it ends early when every request is finished.

    `width` is at most that of the rounds that the state was made for.
    """
    target, drafter = nnx.merge(graph, weights)
    rows = state.cache.rows
    draft_cache = catch_up(drafter, state.draft_cache, state.cache, ~state.finished, width, MOST_ROUNDS)
    state = replace(state, cache=state.cache.fitted(width), draft_cache=draft_cache)

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < rounds) & ~jnp.all(carry[1].finished)

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, decode_round(target, drafter, carry[1], sampling, width)

    state = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))[1]
    return replace(state, cache=state.cache.fitted(rows))


_jitted: Any = partial(jax.jit, run_rounds, static_argnames=("graph", "width"), donate_argnames=("state",))
_of_few, _of_many = _jitted(compiler_options=PRODUCTS), _jitted(compiler_options=MANY_PRODUCTS)


class Run:
    """One batch on its way: its arrays on the device, and on the host what has been seen of its output."""

    def __init__(
        self,
        pair: Pair,
        prompts: list[Prompt],
        max_new: int,
        settings: dict,
        stop: Any,
        draft: bool,
        width: Width | None,
        logprobs: int | None = None,
    ):
        config = pair.target.config
        if isinstance(max_new, bool) or not isinstance(max_new, (int, np.integer)) or max_new < 1:
            raise InputError(f"max_new_tokens is {max_new!r}; give a whole number of at least 1")
        ids = [pair.tokenizer.encode(prompt) for prompt in prompts]
        self.stop_texts, stop_ids = split_stops(stop, config.vocab_size)
        self.width = check_width(pair, draft, width)  # at most
        self.pace = pair.pace if width == "adaptive" else None
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
        self.load = (*tokens.shape, packed.plan)
        self.texts = [] if self.pace is None else self.pace.texts(len(ids))
        self.graph, self.weights = pair.split if self.width > 1 else pair.split_target

    def dispatches(self, rounds: Iterator[int]) -> Iterator[None]:
        """Prefill, then dispatches of rounds until all is finished; the host sees the output after each."""
        with self.pair.on_mesh():
            state = prefill(
                self.graph, self.weights, *self.inputs, self.sampling, self.width, self.chunk, self.pace is not None
            )
        done = self._look(state)
        yield
        while not done:
            state, done = self._advance(state, next(rounds))
            yield

    def _advance(self, state: DecodeState, rounds: int) -> tuple[DecodeState, bool]:
        """One dispatch, of at most so many rounds: (what it left, whether all is finished)."""
        width, running = self.width, [i for i, ended in enumerate(self.ended) if not ended]
        texts = [self.texts[i] for i in running] if self.pace is not None else []
        if self.pace is not None:
            width, most = self.pace.next(self.load, texts)
            rounds = min(rounds, most)
        began, seen = time.perf_counter(), [len(output.counts) for output in self.outputs]
        count = jax.device_put(np.int32(rounds))
        with self.pair.on_mesh():
            run = rounds_for(len(state.finished))
            state = run(self.graph, self.weights, state, self.sampling, count, width)
        done = self._look(state)
        if self.pace is not None:
            counts = [self.outputs[i].counts[seen[i] :] for i in running]
            self.pace.saw(self.load, width, texts, counts, time.perf_counter() - began)
        return state, done

    def _look(self, state: DecodeState) -> bool:
        found = None if state.logprobs is None else state.logprobs.rows
        tokens, known, counts, rounds, finished, found = self.pair.get(
            (state.tokens, state.known, state.counts, state.rounds, state.finished, found)
        )
        for i, output in enumerate(self.outputs):
            own = None if found is None else (found.own[i], found.top[i], found.ids[i])
            output.update(tokens[i, : known[i]], counts[i, : rounds[i]], own)
        ends = zip(finished[: len(self.outputs)], self.outputs, strict=True)
        self.ended = [bool(end) or output.transcript.stopped for end, output in ends]
        return all(self.ended)


def _with_spare(x: Any, spare: int) -> np.ndarray:
    """A batch with its last row repeated."""
    return np.concatenate([np.asarray(x), *[np.asarray(x)[-1:]] * spare])
