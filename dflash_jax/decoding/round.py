"""One round: propose, verify, accept, commit. No host in it."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dflash_jax.cache import DrafterCache, TargetCache
from dflash_jax.decoding.acceptance import Accepted, decide
from dflash_jax.decoding.proposal import plain_proposal, propose
from dflash_jax.decoding.sampling import History, Sampling
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Forward, Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All that B running requests are, on the device.

    A request's anchor is its last known token, at position `known - 1 == cache.lengths`, and not in the cache yet.
    """

    cache: TargetCache
    draft_cache: DrafterCache | None
    tokens: Int[Array, "B S"]  # prompt and output
    known: Int[Array, "B"]  # how many of them are set
    limit: Int[Array, "B"]  # how many may be
    stops: Int[Array, "B E"]  # tokens that end a request; -1 is padding
    finished: Bool[Array, "B"]
    counts: Int[Array, "B S"]  # rows accepted in each round, the anchor's included
    rounds: Int[Array, "B"]
    history: History | None


def decode_round(
    target: Target, drafter: Drafter | None, state: DecodeState, sampling: Sampling | None, width: int
) -> DecodeState:
    """Advance every request that is not finished by 1 to `width` tokens."""
    anchor = jnp.take_along_axis(state.tokens, state.known[:, None] - 1, axis=1)[:, 0]
    with jax.named_scope("propose"):
        if drafter is None or state.draft_cache is None or width == 1:
            proposal = plain_proposal(anchor)
        else:
            cache = state.cache
            proposal = propose(
                target, drafter, anchor, state.draft_cache, cache.lengths, sampling, width, cache.page_table
            )
    with jax.named_scope("verify"):
        taps = () if drafter is None else drafter.config.tap_ids
        forward = target.verify(jnp.maximum(proposal.tokens, 0), state.cache, tap_ids=taps)
    with jax.named_scope("accept"):
        positions = state.known[:, None] + jnp.arange(proposal.width)
        accepted = decide(target.head, forward.hidden, proposal, positions, sampling, state.history)
    with jax.named_scope("commit"):
        return commit(state, drafter, forward, accepted)


def commit(state: DecodeState, drafter: Drafter | None, forward: Forward, accepted: Accepted) -> DecodeState:
    """Make the accepted rows part of the caches and their tokens part of the output."""
    running = ~state.finished
    count = jnp.where(running, accepted.count, 0)
    draft_cache = state.draft_cache
    if drafter is not None and draft_cache is not None:
        context = drafter.context(forward.taps, state.cache.lengths)
        draft_cache = draft_cache.commit(context, state.cache.lengths, count, state.cache.page_table)
    this_round = (jnp.arange(state.counts.shape[1]) == state.rounds[:, None]) & running[:, None]
    state = replace(
        state,
        cache=state.cache.commit(forward.layers, count),
        draft_cache=draft_cache,
        counts=jnp.where(this_round, count[:, None], state.counts),
        rounds=state.rounds + running,
    )
    return emit(state, accepted.emitted, count)


def emit(state: DecodeState, tokens: Int[Array, "B W"], count: Int[Array, "B"]) -> DecodeState:
    """Add the first `count[b]` tokens to the output, up to the first stop token or the limit."""
    W = tokens.shape[1]
    ends = jnp.any(tokens[:, :, None] == state.stops[:, None], -1)
    first_end = jnp.where(ends, jnp.arange(W), W).min(1) + 1
    emitted = jnp.minimum(jnp.minimum(count, first_end), state.limit - state.known)
    known = state.known + emitted
    stopped = (first_end <= count) & (first_end <= emitted)
    added = jnp.arange(W) < emitted[:, None]
    return replace(
        state,
        tokens=jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(state.tokens, tokens, state.known, 0),
        known=known,
        finished=state.finished | stopped | (known >= state.limit),
        history=None if state.history is None else state.history.add(tokens, added),
    )
