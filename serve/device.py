"""The engine's state on the device, one entry a slot, and how a request gets into it."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from dflash_jax.cache import DrafterCache, KeyValues, Recurrence, TargetCache
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.decoding.masks import words_of
from dflash_jax.decoding.observe import BACKLOG
from dflash_jax.decoding.round import DecodeState
from dflash_jax.decoding.sampling import History, Sampling, SamplingPlan
from dflash_jax.sharding import constrain

STOPS = 16  # stop ids a request can have
MIDDLE, LAST, RESUMED = 0, 1, 2  # chunks of a prompt: more follow; the first token follows; it is known already


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
    grammar: bool  # whether grammars are

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
    words: UInt32[Array, "M N"] | None  # what each request's first token may be (see `TokenMask`)

    def laid_out(self) -> "Slots":
        """The same where the context's mesh wants it: heads are spread, and all else every device has.

        Each program gives the state back so, and the next one finds it as it was compiled for.
        """

        def is_layer(x: Any) -> bool:
            return isinstance(x, KeyValues | Recurrence)

        def place(x: Any) -> Any:
            return x.laid_out() if is_layer(x) else constrain(x, "...")

        checkpoints = (
            (constrain(matrix, None, "key_heads", "..."), constrain(tail, None, None, "key_heads", None))
            for matrix, tail in self.checkpoints
        )
        rest = jax.tree.map(place, replace(self, checkpoints=()), is_leaf=is_layer)
        return replace(rest, checkpoints=tuple(checkpoints))


@partial(jax.jit, static_argnames=("target", "drafter", "dtype", "sizes"))
def empty(target: TargetConfig, drafter: DrafterConfig | None, dtype: Any, sizes: Sizes) -> Slots:
    """No request anywhere."""
    M, V, pages = sizes.slots, target.vocab_size, (sizes.pages, sizes.page)
    cache = TargetCache.empty(target, M, sizes.length, sizes.width, dtype, pages)
    numbers, settings = jnp.zeros(M, jnp.int32), sizes.settings
    history = History(jnp.zeros((M, V), bool), jnp.zeros((M, V), jnp.int32)) if settings else None
    decode = DecodeState(
        cache=cache,
        draft_cache=None
        if drafter is None
        else DrafterCache.empty(drafter, *pages, dtype, (M, max(BACKLOG, sizes.rounds))),
        tokens=jnp.zeros((M, sizes.room), jnp.int32),
        start=numbers,
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
        frequency_penalty=off, min_tokens=numbers, seed=numbers.astype(jnp.uint32),
        logit_bias=jnp.zeros((M, V)) if settings else None, plan=SamplingPlan(),
    )  # fmt: skip
    kept = (
        (_room_for(layer.state, sizes.checkpoints), _room_for(layer.conv, sizes.checkpoints))
        for layer in cache.layers
        if isinstance(layer, Recurrence)
    )
    words = jnp.zeros((M, words_of(V)), jnp.uint32) if sizes.grammar else None
    return Slots(decode, sampling, tuple(kept), words).laid_out()


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
    words: UInt32[Array, " N"] | None


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
    draft_cache = d.draft_cache
    if draft_cache is not None and (backlog := draft_cache.backlog) is not None:
        draft_cache = replace(draft_cache, backlog=replace(backlog, count=backlog.count.at[at].set(0)))
    decode = replace(
        d,
        cache=cache,
        draft_cache=draft_cache,
        tokens=d.tokens.at[at].set(new.tokens),
        start=d.start.at[at].set(new.prompt),
        known=d.known.at[at].set(new.known),
        limit=d.limit.at[at].set(new.limit),
        stops=d.stops.at[at].set(new.stops),
        finished=d.finished.at[at].set(True),
        history=history,
    )
    own = replace(new.sampling, plan=state.sampling.plan)
    sampling = jax.tree.map(lambda old, one: old.at[at].set(one[0]), state.sampling, own)
    words = None if state.words is None else state.words.at[at].set(new.words)
    return replace(state, decode=decode, sampling=sampling, words=words).laid_out()


def bytes_of(tree: Any) -> int:
    """Bytes that one device holds of all arrays of a tree, abstract ones with a sharding too."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
