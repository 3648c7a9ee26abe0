"""From prompts to the first token: the same few compiled programs for prompts of any length."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.cache import DrafterCache, TargetCache
from dflash_jax.decoding.acceptance import decide
from dflash_jax.decoding.logprobs import Logprobs
from dflash_jax.decoding.observe import BACKLOG, observe
from dflash_jax.decoding.proposal import plain_proposal
from dflash_jax.decoding.round import DecodeState, emit, mask_of
from dflash_jax.decoding.sampling import History, Sampling, SamplingPlan
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target

CHUNK, SHORT = 128, 32  # prompt rows a pass; of prompts that are all short, all in one pass


def chunk_size(longest: int) -> int:
    """Prompt rows a pass for prompts of up to `longest` tokens."""
    return SHORT if longest <= SHORT else CHUNK


def capacity(longest: int) -> int:
    """Positions to reserve for sequences of up to `longest` tokens: few sizes, so few compilations."""
    size = 2 * CHUNK
    while size < longest:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3  # 2, 3, 4, 6, 8, 12, ... chunks
    return size


@partial(jax.jit, static_argnames=("graph", "width", "chunk", "adaptive"))
def prefill(
    graph: nnx.GraphDef,
    weights: nnx.State,
    prompts: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    limit: Int[Array, "B"],
    stops: Int[Array, "B E"],
    sampling: Sampling | None,
    width: int,
    chunk: int,
    adaptive: bool = False,
) -> DecodeState:
    """Run the prompts through target and drafter, `chunk` rows a pass, and draw the first token.

    S is the capacity, at least `chunk`; `width` is the number of rows of the rounds to come, the most of them where
    that is `adaptive`.
    """
    target, drafter = nnx.merge(graph, weights)
    B, S = prompts.shape
    dtype = target.embed.embedding.dtype
    cache = TargetCache.empty(target.config, B, S, width, dtype)
    backlog = (B, BACKLOG) if adaptive else None
    draft_cache = None if drafter is None else DrafterCache.empty(drafter.config, B, S, dtype, backlog)
    last = jnp.zeros((B, target.config.hidden_size), dtype)
    chunks = (jnp.max(lengths) + chunk - 1) // chunk
    run = partial(_chunk, target, drafter, prompts, lengths, chunk)
    cache, draft_cache, last = jax.lax.fori_loop(0, chunks, run, (cache, draft_cache, last))
    plan = SamplingPlan() if sampling is None else sampling.plan
    state = DecodeState(
        cache=cache,
        draft_cache=draft_cache,
        tokens=prompts,
        start=lengths,
        known=lengths,
        limit=limit,
        stops=stops,
        finished=jnp.zeros(B, bool),
        counts=jnp.zeros((B, S), jnp.int32),
        rounds=jnp.zeros(B, jnp.int32),
        history=History.start(prompts, lengths, target.config.vocab_size) if plan.penalties else None,
        logprobs=Logprobs.empty(B, S, plan.logprobs) if plan.logprobs else None,
    )
    anchors = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)
    end, proposal, positions = last[:, None], plain_proposal(anchors[:, 0]), lengths[:, None]
    mask = mask_of(state, sampling, positions)
    first = decide(target.head, end, proposal, positions, sampling, state.history, mask)
    found = None if state.logprobs is None else state.logprobs.read(target.head, end, first.emitted)
    return emit(state, first.emitted, first.count, found)


def _chunk(
    target: Target, drafter: Drafter | None, prompts: Array, lengths: Array, size: int, i: Array, carry: tuple
) -> tuple:
    cache, draft_cache, last = carry
    rows = jax.lax.dynamic_slice_in_dim(prompts, i * size, size, axis=1)
    count = jnp.clip(lengths - i * size, 0, size)
    cache, draft_cache, hidden = prefill_rows(target, drafter, rows, count, cache, draft_cache)
    end = last_rows(hidden, count)
    ends_here = (count > 0) & (lengths <= (i + 1) * size)
    return cache, draft_cache, jnp.where(ends_here[:, None], end, last)


def prefill_rows(
    target: Target,
    drafter: Drafter | None,
    rows: Int[Array, "B T"],
    count: Int[Array, "B"],
    cache: TargetCache,
    draft_cache: DrafterCache | None,
) -> tuple[TargetCache, DrafterCache | None, Float[Array, "B T D"]]:
    """Commit the first `count[b]` of T known tokens to both caches; also return the hidden states of all."""
    taps = () if drafter is None else drafter.config.tap_ids
    out, new = target.prefill(rows, count, cache, tap_ids=taps)
    if drafter is not None and draft_cache is not None:
        draft_cache = observe(drafter, draft_cache, out.taps, cache.lengths, count, cache.page_table)
    return new, draft_cache, out.hidden


def last_rows(hidden: Float[Array, "B T D"], count: Int[Array, "B"]) -> Float[Array, "B D"]:
    """Return the hidden state of the last of the first `count[b]` rows."""
    return jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
