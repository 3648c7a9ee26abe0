"""The programs of the engine that run the models: a chunk of prompts, and rounds.

Each takes the slots it works on from the state, as a batch of its own, and puts them back. So the host only sends which
slots, and which pages are new; and it can dispatch the next program before it has seen what the last one did.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dflash_jax.cache import Recurrence, TargetCache
from dflash_jax.decoding.acceptance import decide
from dflash_jax.decoding.prefill import last_rows, prefill_rows
from dflash_jax.decoding.proposal import plain_proposal
from dflash_jax.decoding.round import DecodeState, decode_round, emit, mask_of
from dflash_jax.decoding.run import MANY, MANY_PRODUCTS, PRODUCTS
from dflash_jax.decoding.sampling import SamplingPlan
from serve.batch import caught_up, put_back, taken
from serve.device import LAST, RESUMED, Sizes, Slots
from serve.news import logprob_row, news_row


def with_pages(state: Slots, deltas: Int[Array, " n"]) -> Slots:
    """The state with new pages in its tables: (slot, entry, page) each, a slot past the last for none."""
    cache = state.decode.cache
    assert cache.page_table is not None
    slots, entries, pages = deltas.reshape(-1, 3).T
    table = cache.page_table.at[slots, entries].set(pages, mode="drop")
    return replace(state, decode=replace(state.decode, cache=replace(cache, page_table=table)))


def rounds_for(bucket: int) -> Any:
    """The compiled `run_rounds` for so many slots."""
    return _of_few if bucket < MANY else _of_many


def run_rounds(
    graph: nnx.GraphDef,
    weights: nnx.State,
    state: Slots,
    order: Int[Array, " n"],
    *,
    bucket: int,
    sizes: Sizes,
    width: int,
    plan: SamplingPlan,
) -> tuple[Slots, Int[Array, "B n"]]:
    """Rounds of some slots in one dispatch, up to the one in which a request ends, and the news of them.

    `order` is one array, so that the host sends one: the slots (past the last: none), how many rounds at most, and new
    pages as (slot, entry of its table, page).
    """
    target, drafter = nnx.merge(graph, weights)
    slots, rounds, deltas = order[:bucket], order[bucket], order[bucket + 1 :]
    state = with_pages(state, deltas)
    part, sampling, there = taken(state, slots, plan, width, sizes.rounds, bucket == sizes.slots)
    part, before = caught_up(part, drafter, width, sizes.rounds), part.known

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        done, now = carry
        # The first round of a dispatch gives the host time to fill a slot that the dispatch before has left empty.
        return (done < rounds) & ~jnp.all(now.finished) & ((done == 0) | ~jnp.any(now.finished & there))

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, decode_round(target, drafter, carry[1], sampling, width)

    part = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), part))[1]
    state = put_back(state, part, slots, there, sizes.width, bucket == sizes.slots)
    return state, news_row(part, before, sizes.rounds * width)


_jitted: Any = partial(
    jax.jit,
    run_rounds,
    static_argnames=("graph", "bucket", "sizes", "width", "plan"),
    donate_argnames=("state",),
)
_of_few, _of_many = _jitted(compiler_options=PRODUCTS), _jitted(compiler_options=MANY_PRODUCTS)


@partial(
    jax.jit,
    static_argnames=("graph", "shape", "sizes", "plan", "scored"),
    donate_argnames=("state",),
    compiler_options=PRODUCTS,
)
def run_prefill(
    graph: nnx.GraphDef,
    weights: nnx.State,
    state: Slots,
    order: Int[Array, "4 P"],
    *,
    shape: tuple[int, int],
    sizes: Sizes,
    plan: SamplingPlan,
    scored: bool,
) -> tuple[Slots, Int[Array, "P n"], Int[Array, "P m"] | None]:
    """The next tokens of some prompts through both models, and the first token of those that end here.

    Where they are `scored`, the log-probabilities of the prompts' tokens after each of these come along.

    `order`: slot, how many tokens, MIDDLE, LAST or RESUMED, and the checkpoint to keep the recurrent state in (past the
    last: none). `shape` is (prompts, most tokens of each).
    """
    target, drafter = nnx.merge(graph, weights)
    slots, count, kind, save = order
    part, sampling, there = taken(state, slots, plan, sizes.width, 0, False)
    at = part.cache.lengths[:, None] + jnp.arange(shape[1])
    rows = jnp.take_along_axis(part.tokens, at, axis=1, mode="clip")
    cache, draft_cache, hidden = prefill_rows(target, drafter, rows, count, part.cache, part.draft_cache)
    scores, end = None, last_rows(hidden, count)
    if scored and part.logprobs is not None:
        following = jnp.take_along_axis(part.tokens, at + 1, axis=1, mode="clip")
        scores = logprob_row(part.logprobs.read(target.head, hidden, following))
    part = replace(part, cache=cache, draft_cache=draft_cache, finished=there & (kind != LAST))
    anchor = jnp.take_along_axis(part.tokens, jnp.maximum(part.known - 1, 0)[:, None], axis=1)[:, 0]
    before, end = part.known, end[:, None]
    words = None if state.words is None else state.words[slots][:, None]
    mask = mask_of(part, sampling, before[:, None], words)
    first = decide(target.head, end, plain_proposal(anchor), before[:, None], sampling, part.history, mask)
    found = None if part.logprobs is None else part.logprobs.read(target.head, end, first.emitted)
    part = emit(part, first.emitted, jnp.where(kind == LAST, first.count, 0), found)
    news = news_row(part, before, 1)
    part = replace(part, finished=jnp.where(kind == RESUMED, False, part.finished))
    state = replace(state, checkpoints=_kept(state, cache, save))
    return put_back(state, part, slots, there, sizes.width, False), news, scores


def _kept(state: Slots, cache: TargetCache, save: Int[Array, "P"]) -> tuple[tuple[Array, Array], ...]:
    """The checkpoints with the recurrent states after a prefill, which have nothing pending."""
    layers = [layer for layer in cache.layers if isinstance(layer, Recurrence)]
    return tuple(
        (states.at[save].set(layer.state, mode="drop"), tails.at[save].set(layer.conv, mode="drop"))
        for (states, tails), layer in zip(state.checkpoints, layers, strict=True)
    )
