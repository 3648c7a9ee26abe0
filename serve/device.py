"""The engine's state on the device, one entry a slot, and the three programs that change it: admit, prefill, rounds.

Each takes the slots it works on from the state, as a batch of its own, and puts them back. So the host only sends which
slots, and which pages are new; and it can dispatch the next program before it has seen what the last one did.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dflash_jax.cache import DrafterCache, Recurrence, TargetCache
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.decoding.acceptance import decide
from dflash_jax.decoding.generate import PRODUCTS
from dflash_jax.decoding.prefill import prefill_rows
from dflash_jax.decoding.proposal import plain_proposal
from dflash_jax.decoding.round import DecodeState, decode_round, emit
from dflash_jax.decoding.sampling import History, Sampling, SamplingPlan
from dflash_jax.sharding import constrain

STOPS = 16  # stop ids a request can have
MIDDLE, LAST, RESUMED = 0, 1, 2  # chunks of a prompt: more follow; the first token follows; it is known already
HEADER = 3  # numbers of a row of news before its counts: tokens emitted, whether it has ended, rounds


@dataclass(frozen=True)
class Sizes:
    """What fixes the shapes of the state."""

    slots: int
    length: int  # tokens a sequence, prompt and output
    width: int  # rows of the widest round
    rounds: int  # most rounds a dispatch
    pages: int
    page: int  # tokens
    checkpoints: int
    settings: bool  # whether penalties and biases are possible

    @property
    def room(self) -> int:
        """Token ids kept a slot; what the last dispatch of rounds emits past the limit has room too."""
        return self.length + self.rounds * self.width

    @property
    def table(self) -> int:
        """Entries of a page table."""
        return -(-self.length // self.page)

    @property
    def deltas(self) -> int:
        """Most new pages a dispatch of rounds."""
        return self.slots * (self.rounds * self.width // self.page + 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """All requests on the device. `decode.counts` is empty: counts are news of a dispatch, and not kept."""

    decode: DecodeState
    sampling: Sampling
    checkpoints: tuple[tuple[Array, Array], ...]  # state and convolution tail of each recurrent layer, by checkpoint


def laid_out(state: Slots) -> Slots:
    """The state where the context's mesh wants it: heads are spread, all else every device has.

    All programs give it back so; the next one then finds it as it was compiled for.
    """
    d, whole = state.decode, partial(jax.tree.map, lambda x: constrain(x, "..."))
    decode = whole(replace(d, cache=replace(d.cache, layers=()), draft_cache=None))
    drafted = None if d.draft_cache is None else DrafterCache(tuple(x.laid_out() for x in d.draft_cache.layers))
    kept = (
        (constrain(matrix, None, "key_heads", "..."), constrain(tail, None, None, "key_heads", None))
        for matrix, tail in state.checkpoints
    )
    cache = replace(decode.cache, layers=tuple(x.laid_out() for x in d.cache.layers))
    return Slots(replace(decode, cache=cache, draft_cache=drafted), whole(state.sampling), tuple(kept))


@partial(jax.jit, static_argnames=("target", "drafter", "dtype", "sizes"))
def empty(target: TargetConfig, drafter: DrafterConfig | None, dtype: Any, sizes: Sizes) -> Slots:
    """No request anywhere."""
    M, V, pages = sizes.slots, target.vocab_size, (sizes.pages, sizes.page)
    cache = TargetCache.empty(target, M, sizes.length, sizes.width, dtype, pages)
    numbers, settings = jnp.zeros(M, jnp.int32), sizes.settings
    history = History(jnp.zeros((M, V), bool), jnp.zeros((M, V), jnp.int32)) if settings else None
    decode = DecodeState(
        cache=cache,
        draft_cache=None if drafter is None else DrafterCache.empty(drafter, *pages, dtype),
        tokens=jnp.zeros((M, sizes.room), jnp.int32),
        known=numbers,
        limit=numbers,
        stops=jnp.full((M, STOPS), -1, jnp.int32),
        finished=jnp.ones(M, bool),
        counts=jnp.zeros((M, 0), jnp.int32),
        rounds=numbers,
        history=history,
    )
    off, on = jnp.zeros(M), jnp.ones(M)
    sampling = Sampling(
        temperature=off, top_k=numbers, top_p=on, min_p=off, repetition_penalty=on, presence_penalty=off,
        frequency_penalty=off, seed=numbers.astype(jnp.uint32), logit_bias=jnp.zeros((M, V)) if settings else None,
        plan=SamplingPlan(),
    )  # fmt: skip
    kept = (
        (_room_for(layer.state, sizes.checkpoints), _room_for(layer.conv, sizes.checkpoints))
        for layer in cache.layers
        if isinstance(layer, Recurrence)
    )
    return laid_out(Slots(decode, sampling, tuple(kept)))


def _room_for(rows: Array, count: int) -> Array:
    return jnp.zeros((count, *rows.shape[1:]), rows.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Admission:
    """A request that takes a slot."""

    slot: Int[Array, ""]
    tokens: Int[Array, " S"]  # prompt and, if it was here before, output
    prompt: Int[Array, ""]  # how many are the prompt
    known: Int[Array, ""]  # how many are known
    limit: Int[Array, ""]
    stops: Int[Array, " E"]
    pages: Int[Array, " n"]
    cached: Int[Array, ""]  # tokens that the pages hold already
    checkpoint: Int[Array, ""]  # of the recurrent state behind those; -1 for none
    sampling: Sampling  # of one request


@partial(jax.jit, donate_argnames=("state",))
def admit(state: Slots, new: Admission) -> Slots:
    """The state with a request in its slot, which has to be prefilled from `cached` on."""
    at, d = new.slot, state.decode
    restored = iter(state.checkpoints)

    def layer(x: Any) -> Any:
        if not isinstance(x, Recurrence):
            return x
        matrix, conv = (jnp.where(new.checkpoint >= 0, kept[new.checkpoint], 0) for kept in next(restored))
        pending = replace(jax.tree.map(jnp.zeros_like, x.pending), fold=jnp.ones_like(x.pending.fold))
        pending = jax.tree.map(lambda old, none: old.at[at].set(none[0]), x.pending, pending)
        return Recurrence(x.state.at[at].set(matrix), x.conv.at[at].set(conv), pending)

    cache = TargetCache(
        lengths=d.cache.lengths.at[at].set(new.cached),
        layers=tuple(layer(x) for x in d.cache.layers),
        page_table=None if d.cache.page_table is None else d.cache.page_table.at[at].set(new.pages),
    )
    history = d.history
    if history is not None:
        own = History.start(new.tokens[None], new.prompt[None], history.counts.shape[1])
        i = jnp.arange(new.tokens.shape[0])
        own = own.add(new.tokens[None], ((i >= new.prompt) & (i < new.known))[None])
        history = jax.tree.map(lambda old, one: old.at[at].set(one[0]), history, own)
    decode = replace(
        d,
        cache=cache,
        tokens=d.tokens.at[at].set(new.tokens),
        known=d.known.at[at].set(new.known),
        limit=d.limit.at[at].set(new.limit),
        stops=d.stops.at[at].set(new.stops),
        finished=d.finished.at[at].set(True),
        history=history,
    )
    own = replace(new.sampling, plan=state.sampling.plan)
    settings = jax.tree.map(lambda old, one: old.at[at].set(one[0]), state.sampling, own)
    return laid_out(replace(state, decode=decode, sampling=settings))


def _taken(
    state: Slots, slots: Int[Array, "B"], plan: SamplingPlan, width: int, rounds: int, draft: bool, in_place: bool
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
            d, cache=d.cache.take(slots), tokens=d.tokens[slots], known=d.known[slots], limit=d.limit[slots],
            stops=d.stops[slots], finished=d.finished[slots], history=rows(d.history) if plan.penalties else None,
        )  # fmt: skip
        sampling = rows(state.sampling)
    table = part.cache.page_table
    assert table is not None
    part = replace(
        part,
        cache=replace(part.cache.fitted(width), page_table=jnp.where(there[:, None], table, -1)),
        draft_cache=part.draft_cache if draft else None,
        finished=part.finished | ~there,
        counts=jnp.zeros((B, rounds), jnp.int32),
        rounds=jnp.zeros(B, jnp.int32),
        history=part.history if plan.penalties else None,
    )
    sampling = replace(sampling, plan=plan, logit_bias=sampling.logit_bias if plan.bias else None)
    return part, None if plan.neutral else sampling, there


def _with(state: Slots, part: DecodeState, slots: Int[Array, "B"], there: Array, width: int, in_place: bool) -> Slots:
    """The state with a batch of slots put back."""
    d = state.decode
    cache = part.cache.fitted(width)
    draft_cache = d.draft_cache if part.draft_cache is None else part.draft_cache
    if in_place:
        finished = jnp.where(there, part.finished, d.finished)
        cache = replace(cache, page_table=d.cache.page_table)
        kept = d.history if part.history is None else part.history
        return replace(
            state,
            decode=replace(
                part, cache=cache, draft_cache=draft_cache, finished=finished, history=kept, counts=d.counts,
                rounds=d.rounds,
            ),
        )  # fmt: skip

    def put(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, y: x.at[slots].set(y, mode="drop"), old, new)

    decode = replace(
        d,
        cache=d.cache.put(cache, slots),
        draft_cache=draft_cache,
        tokens=put(d.tokens, part.tokens),
        known=put(d.known, part.known),
        finished=put(d.finished, part.finished),
        history=d.history if part.history is None else put(d.history, part.history),
    )
    return replace(state, decode=decode)


@partial(
    jax.jit,
    static_argnames=("graph", "bucket", "sizes", "width", "plan", "draft"),
    donate_argnames=("state",),
    compiler_options=PRODUCTS,
)
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
    draft: bool,
) -> tuple[Slots, Int[Array, "B n"]]:
    """Rounds of some slots in one dispatch, and the news of them.

    `order` is one array, so that the host sends one: the slots (past the last: none), how many rounds, whether to stop
    as soon as a request has ended, and new pages as (slot, entry of its table, page).
    """
    target, drafter = nnx.merge(graph, weights)
    slots, (rounds, leave), deltas = order[:bucket], order[bucket : bucket + 2], order[bucket + 2 :].reshape(-1, 3)
    cache = state.decode.cache
    assert cache.page_table is not None
    table = cache.page_table.at[deltas[:, 0], deltas[:, 1]].set(deltas[:, 2], mode="drop")
    state = replace(state, decode=replace(state.decode, cache=replace(cache, page_table=table)))
    part, sampling, there = _taken(state, slots, plan, width, sizes.rounds, draft, bucket == sizes.slots)
    before, ended = part.known, part.finished

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        done, now = carry
        left = (leave > 0) & jnp.any(now.finished & ~ended)
        return (done < rounds) & ~jnp.all(now.finished) & ~left

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, decode_round(target, drafter if draft else None, carry[1], sampling, width)

    part = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), part))[1]
    at = before[:, None] + jnp.arange(sizes.rounds * width)
    emitted = jnp.take_along_axis(part.tokens, at, axis=1, mode="clip")
    header = jnp.stack([part.known - before, part.finished.astype(jnp.int32), part.rounds], 1)
    state = _with(state, part, slots, there, sizes.width, bucket == sizes.slots)
    return laid_out(state), constrain(jnp.concatenate([header, part.counts, emitted], 1), "...")


@partial(
    jax.jit,
    static_argnames=("graph", "shape", "sizes", "plan"),
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
) -> tuple[Slots, Int[Array, "P 4"]]:
    """The next tokens of some prompts through both models, and the first token of those that end here.

    `order`: slot, how many tokens, MIDDLE, LAST or RESUMED, and the checkpoint to keep the recurrent state in (past the
    last: none). `shape` is (prompts, most tokens of each).
    """
    target, drafter = nnx.merge(graph, weights)
    slots, count, kind, save = order
    part, sampling, there = _taken(state, slots, plan, sizes.width, 0, True, False)
    at = part.cache.lengths[:, None] + jnp.arange(shape[1])
    rows = jnp.take_along_axis(part.tokens, at, axis=1, mode="clip")
    cache, draft_cache, end = prefill_rows(target, drafter, rows, count, part.cache, part.draft_cache)
    part = replace(part, cache=cache, draft_cache=draft_cache, finished=there & (kind != LAST))
    anchor = jnp.take_along_axis(part.tokens, jnp.maximum(part.known - 1, 0)[:, None], axis=1)[:, 0]
    first = decide(target.head, end[:, None], plain_proposal(anchor), part.known[:, None], sampling, part.history)
    before = part.known
    part = emit(part, first.emitted, jnp.where(kind == LAST, first.count, 0))
    news = jnp.stack([part.known - before, part.finished.astype(jnp.int32), jnp.zeros_like(before), first.bonus], 1)
    part = replace(part, finished=jnp.where(kind == RESUMED, False, part.finished))
    state = replace(state, checkpoints=_kept(state, cache, save))
    return laid_out(_with(state, part, slots, there, sizes.width, False)), constrain(news, "...")


def _kept(state: Slots, cache: TargetCache, save: Int[Array, "P"]) -> tuple[tuple[Array, Array], ...]:
    """The checkpoints with the recurrent states after a prefill, which have nothing pending."""
    layers = [layer for layer in cache.layers if isinstance(layer, Recurrence)]
    return tuple(
        (states.at[save].set(layer.state, mode="drop"), tails.at[save].set(layer.conv, mode="drop"))
        for (states, tails), layer in zip(state.checkpoints, layers, strict=True)
    )


def news_of(row: Any, rounds: int) -> tuple[list[int], list[int], bool]:
    """From one row of news, on the host: tokens, rows accepted in each round, whether the request has ended."""
    emitted, ended, done = row[:HEADER].tolist()
    start = HEADER + rounds
    return row[start : start + emitted].tolist(), row[HEADER : HEADER + done].tolist(), bool(ended)


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree, abstract ones too."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
