"""Some slots of the engine's state as a batch of their own, and back."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dflash_jax.decoding.logprobs import Logprobs
from dflash_jax.decoding.observe import catch_up
from dflash_jax.decoding.round import DecodeState
from dflash_jax.decoding.sampling import Sampling, SamplingPlan
from dflash_jax.models.drafter import Drafter
from serve.device import Slots


def taken(
    state: Slots, slots: Int[Array, "B"], plan: SamplingPlan, width: int, rounds: int, in_place: bool
) -> tuple[DecodeState, Sampling | None, Array]:
    """Slots as a batch, their settings, and which entries are requests at all: a slot past the last is none.

    `in_place`: they are all slots in order, but for those that are none.
    """
    d, B = state.decode, slots.shape[0]
    there = slots < d.known.shape[0]
    if in_place:
        part, sampling = d, state.sampling
    else:
        rows = partial(jax.tree.map, lambda x: x[slots])
        part = replace(
            d, cache=d.cache.take(slots), tokens=d.tokens[slots], start=d.start[slots], known=d.known[slots],
            draft_cache=None if d.draft_cache is None else d.draft_cache.take(slots), limit=d.limit[slots],
            stops=d.stops[slots], finished=d.finished[slots], history=rows(d.history) if plan.penalties else None,
        )  # fmt: skip
        sampling = rows(state.sampling)
    table = part.cache.page_table
    assert table is not None
    part = replace(
        part,
        cache=replace(part.cache.fitted(width), page_table=jnp.where(there[:, None], table, -1)),
        finished=part.finished | ~there,
        counts=jnp.zeros((B, rounds), jnp.int32),
        rounds=jnp.zeros(B, jnp.int32),
        history=part.history if plan.penalties else None,
        logprobs=Logprobs.empty(B, max(1, rounds * width), plan.logprobs) if plan.logprobs else None,
    )
    sampling = replace(sampling, plan=plan, logit_bias=sampling.logit_bias if plan.bias else None)
    return part, None if plan.neutral else sampling, there


def caught_up(part: DecodeState, drafter: Drafter | None, width: int, rounds: int) -> DecodeState:
    """Return a batch whose drafter is ready for up to `rounds` rounds of `width` rows."""
    made = catch_up(drafter, part.draft_cache, part.cache, ~part.finished, width, rounds)
    return replace(part, draft_cache=made)


def put_back(
    state: Slots, part: DecodeState, slots: Int[Array, "B"], there: Array, width: int, in_place: bool
) -> Slots:
    """The state with a batch of slots put back."""
    d = state.decode
    cache = part.cache.fitted(width)
    if in_place:
        finished = jnp.where(there, part.finished, d.finished)
        cache = replace(cache, page_table=d.cache.page_table)
        kept = d.history if part.history is None else part.history
        decode = replace(
            part, cache=cache, finished=finished, history=kept, counts=d.counts,
            rounds=d.rounds, logprobs=None,
        )  # fmt: skip
        return replace(state, decode=decode).laid_out()

    def put(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, y: x.at[slots].set(y, mode="drop"), old, new)

    drafted = part.draft_cache
    decode = replace(
        d,
        cache=d.cache.put(cache, slots),
        draft_cache=None if d.draft_cache is None or drafted is None else d.draft_cache.put(drafted, slots),
        tokens=put(d.tokens, part.tokens),
        known=put(d.known, part.known),
        finished=put(d.finished, part.finished),
        history=d.history if part.history is None else put(d.history, part.history),
    )
    return replace(state, decode=decode).laid_out()
