"""A round of requests with grammars, in two programs: between draft and check the host says what may come.

The drafts stay as they were drawn. One that breaks its grammar has probability 0 in the masked distribution of the row
before it, and is refused by the same test as any other; so the output has the distribution of plain sampling under the
same masks.
"""

from dataclasses import replace
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Int, UInt32

from dflash_jax.decoding.proposal import Proposal
from dflash_jax.decoding.round import propose_round, verify_round
from dflash_jax.decoding.run import PRODUCTS
from dflash_jax.decoding.sampling import SamplingPlan
from dflash_jax.sharding import constrain
from serve.batch import caught_up, put_back, taken
from serve.device import Sizes, Slots
from serve.news import news_row
from serve.steps import with_pages

_STATIC = ("graph", "bucket", "sizes", "width", "plan")


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("state",), compiler_options=PRODUCTS)
def run_proposal(
    graph: nnx.GraphDef,
    weights: nnx.State,
    state: Slots,
    slots: Int[Array, " bucket"],
    *,
    bucket: int,
    sizes: Sizes,
    width: int,
    plan: SamplingPlan,
) -> tuple[Slots, Proposal]:
    """Draft for some slots, whole on every device. The state differs only in what the drafter has read."""
    target, drafter = nnx.merge(graph, weights)
    part, sampling, _ = taken(state, slots, plan, width, 1, bucket == sizes.slots)
    part = caught_up(part, drafter, width, 1)
    proposal = propose_round(target, drafter, part, sampling, width)
    if state.decode.draft_cache is not None and part.draft_cache is not None:
        draft_cache = state.decode.draft_cache.put(part.draft_cache, slots)
        state = replace(state, decode=replace(state.decode, draft_cache=draft_cache))
    return state.laid_out(), jax.tree.map(lambda x: constrain(x, "..."), proposal)


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("state",), compiler_options=PRODUCTS)
def run_check(
    graph: nnx.GraphDef,
    weights: nnx.State,
    state: Slots,
    proposal: Proposal,
    words: UInt32[Array, "B W N"],
    order: Int[Array, " n"],
    *,
    bucket: int,
    sizes: Sizes,
    width: int,
    plan: SamplingPlan,
) -> tuple[Slots, Int[Array, "B n"]]:
    """Verify, accept and commit what `run_proposal` gave for the same slots, and the news.

    `words` says which tokens may follow each row; `order` holds the slots, then new pages as in `steps.run_rounds`.
    """
    target, drafter = nnx.merge(graph, weights)
    slots, state = order[:bucket], with_pages(state, order[bucket:])
    part, sampling, there = taken(state, slots, plan, width, 1, bucket == sizes.slots)
    before = part.known
    part = verify_round(target, drafter, part, sampling, proposal, words)
    return put_back(state, part, slots, there, sizes.width, bucket == sizes.slots), news_row(part, before, width)
