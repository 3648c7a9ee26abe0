"""What a dispatch tells the host: one row of int32 a request, so that one read brings everything."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dflash_jax.decoding.logprobs import RowLogprobs
from dflash_jax.decoding.output import HostLogprobs
from dflash_jax.decoding.round import DecodeState
from dflash_jax.sharding import constrain

HEADER = 4  # numbers before the counts: tokens emitted, whether the request has ended, rounds, rows the drafter lacks


def news_row(part: DecodeState, before: Int[Array, "B"], room: int) -> Int[Array, "B n"]:
    """Of a batch that had `before` tokens, and has got up to `room` more."""
    at = before[:, None] + jnp.arange(room)
    emitted = jnp.take_along_axis(part.tokens, at, axis=1, mode="clip")
    backlog = None if part.draft_cache is None else part.draft_cache.backlog
    behind = jnp.zeros_like(before) if backlog is None else backlog.count
    header = jnp.stack([part.known - before, part.finished.astype(jnp.int32), part.rounds, behind], 1)
    columns = [header, part.counts, emitted]
    if part.logprobs is not None:
        columns.append(logprob_row(part.logprobs.rows))
    return constrain(jnp.concatenate(columns, 1), "...")  # whole, so that every process can read it


def logprob_row(rows: RowLogprobs) -> Int[Array, "B n"]:
    """Return log-probabilities as bits, a row for each request."""
    bits = (jax.lax.bitcast_convert_type(x, jnp.int32) for x in (rows.own, rows.top))
    return constrain(jnp.concatenate([x.reshape(x.shape[0], -1) for x in (*bits, rows.ids)], 1), "...")


def logprobs_of(row: np.ndarray, room: int, top: int, count: int) -> HostLogprobs:
    """Return the first `count` of such a row, which has `top` likely tokens beside each of `room`."""
    own, likely, ids = np.split(row, [room, room + room * top])
    values = own.view(np.float32), likely.view(np.float32).reshape(room, top), ids.reshape(room, top)
    return values[0][:count], values[1][:count], values[2][:count]


@dataclass(frozen=True)
class News:
    """What one request has said."""

    tokens: list[int]
    counts: list[int]  # rows accepted in each round
    ended: bool
    behind: int  # committed rows that the drafter has not read
    logprobs: HostLogprobs | None


def news_of(row: np.ndarray, rounds: int, room: int, top: int) -> News:
    """From a row that has counts of so many rounds, and `top` likely tokens beside each of `room` (0: no logprobs)."""
    emitted, ended, done, behind = row[:HEADER].tolist()
    counts, start = row[HEADER : HEADER + done].tolist(), HEADER + rounds
    tokens, found = row[start : start + emitted].tolist(), None
    if top:
        found = logprobs_of(row[start + room :], room, top, emitted)
    return News(tokens, counts, bool(ended), behind, found)
