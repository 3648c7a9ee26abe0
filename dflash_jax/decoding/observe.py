"""What the drafter reads of the target: the taps of committed rows, at once or in one pass before it drafts again."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dflash_jax.cache import Backlog, DrafterCache, TargetCache
from dflash_jax.models.drafter import Drafter

BACKLOG = (
    32  # rows of a sequence that plain rounds may leave unread: one pass over them costs about as much as over one
)


def observe(
    drafter: Drafter,
    cache: DrafterCache,
    taps: Float[Array, "B T CD"],
    lengths: Int[Array, "B"],
    count: Int[Array, "B"],
    page_table: Int[Array, "B n"] | None,
) -> DrafterCache:
    """Return the cache with the first `count[b]` of T rows, which stand at `lengths[b]` and after."""
    return cache.commit(drafter.context(taps, lengths), lengths, count, page_table)


def observe_round(
    drafter: Drafter,
    cache: DrafterCache,
    taps: Float[Array, "B W CD"],
    target: TargetCache,
    count: Int[Array, "B"],
) -> DrafterCache:
    """Return the cache after a round that keeps `count[b]` rows behind `target.lengths`; one row may wait unread."""
    if cache.backlog is not None and taps.shape[1] == 1:
        return DrafterCache(cache.layers, cache.backlog.add(taps, count))
    return observe(drafter, cache, taps, target.lengths, count, target.page_table)


def catch_up(
    drafter: Drafter | None,
    cache: DrafterCache | None,
    target: TargetCache,
    running: Bool[Array, "B"],
    width: int,
    rounds: int,
) -> DrafterCache | None:
    """Return the cache ready for a dispatch of up to `rounds` rounds of `width` rows.

    Rounds that draft need every committed row; plain ones need room for their own. Only running sequences count.
    """
    if drafter is None or cache is None or cache.backlog is None:
        return cache
    behind = jnp.where(running, cache.backlog.count, 0)
    room = cache.backlog.taps.shape[1]
    due = behind > 0 if width > 1 else behind + rounds > room

    def read(cache: DrafterCache) -> DrafterCache:
        assert cache.backlog is not None
        start = target.lengths - behind
        made = observe(drafter, cache, cache.backlog.taps, start, behind, target.page_table)
        return DrafterCache(made.layers, Backlog(cache.backlog.taps, cache.backlog.count - behind))

    return jax.lax.cond(jnp.any(due), read, lambda cache: cache, cache)
