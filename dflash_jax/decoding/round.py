"""One round: propose, verify, accept, commit. No host in it."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from dflash_jax.cache import DrafterCache, TargetCache
from dflash_jax.decoding.acceptance import Accepted, decide
from dflash_jax.decoding.logprobs import Logprobs, RowLogprobs
from dflash_jax.decoding.masks import TokenMask
from dflash_jax.decoding.observe import observe_round
from dflash_jax.decoding.proposal import Proposal, plain_proposal, propose
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
    start: Int[Array, "B"]  # how many of them are the prompt
    known: Int[Array, "B"]  # how many of them are set
    limit: Int[Array, "B"]  # how many may be
    stops: Int[Array, "B E"]  # tokens that end a request; -1 is padding
    finished: Bool[Array, "B"]
    counts: Int[Array, "B S"]  # rows accepted in each round, the anchor's included
    rounds: Int[Array, "B"]
    history: History | None
    logprobs: Logprobs | None = None


def decode_round(
    target: Target, drafter: Drafter | None, state: DecodeState, sampling: Sampling | None, width: int
) -> DecodeState:
    """Advance every request that is not finished by 1 to `width` tokens."""
    with jax.named_scope("propose"):
        proposal = propose_round(target, drafter, state, sampling, width)
    return verify_round(target, drafter, state, sampling, proposal)


def propose_round(
    target: Target, drafter: Drafter | None, state: DecodeState, sampling: Sampling | None, width: int
) -> Proposal:
    """The anchors, and what the drafter thinks will follow them."""
    anchor = jnp.take_along_axis(state.tokens, state.known[:, None] - 1, axis=1)[:, 0]
    if drafter is None or state.draft_cache is None or width == 1:
        return plain_proposal(anchor)
    cache = state.cache
    return propose(target, drafter, anchor, state.draft_cache, cache.lengths, sampling, width, cache.page_table)


def verify_round(
    target: Target,
    drafter: Drafter | None,
    state: DecodeState,
    sampling: Sampling | None,
    proposal: Proposal,
    words: UInt32[Array, "B W N"] | None = None,
) -> DecodeState:
    """Verify, accept and commit a proposal. `words`: which tokens may follow each row (see `TokenMask`)."""
    with jax.named_scope("verify"):
        taps = () if drafter is None else drafter.config.tap_ids
        forward = target.verify(jnp.maximum(proposal.tokens, 0), state.cache, tap_ids=taps)
    with jax.named_scope("accept"):
        positions = state.known[:, None] + jnp.arange(proposal.width)
        mask = mask_of(state, sampling, positions, words)
        accepted = decide(target.head, forward.hidden, proposal, positions, sampling, state.history, mask)
        kept = state.logprobs
        found = None if kept is None else kept.read(target.head, forward.hidden, accepted.emitted)
    with jax.named_scope("commit"):
        return commit(state, drafter, forward, accepted, found)


def mask_of(
    state: DecodeState,
    sampling: Sampling | None,
    positions: Int[Array, "B W"],
    words: UInt32[Array, "B W N"] | None = None,
) -> TokenMask | None:
    """What may come at these positions; None: anything."""
    early = None
    if sampling is not None and sampling.plan.min_tokens:
        early = positions < (state.start + sampling.min_tokens)[:, None]
    return None if early is None and words is None else TokenMask(state.stops, early, words)


def commit(
    state: DecodeState, drafter: Drafter | None, forward: Forward, accepted: Accepted, found: RowLogprobs | None
) -> DecodeState:
    """Make the accepted rows part of the caches and their tokens part of the output."""
    running = ~state.finished
    count = jnp.where(running, accepted.count, 0)
    draft_cache = state.draft_cache
    if drafter is not None and draft_cache is not None:
        draft_cache = observe_round(drafter, draft_cache, forward.taps, state.cache, count)
    this_round = (jnp.arange(state.counts.shape[1]) == state.rounds[:, None]) & running[:, None]
    state = replace(
        state,
        cache=state.cache.commit(forward.layers, count),
        draft_cache=draft_cache,
        counts=jnp.where(this_round, count[:, None], state.counts),
        rounds=state.rounds + running,
    )
    return emit(state, accepted.emitted, count, found)


def emit(
    state: DecodeState, tokens: Int[Array, "B W"], count: Int[Array, "B"], found: RowLogprobs | None = None
) -> DecodeState:
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
        logprobs=state.logprobs if state.logprobs is None or found is None else state.logprobs.add(found, emitted),
    )
