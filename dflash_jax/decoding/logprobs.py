"""Log-probabilities of emitted tokens, from the hidden states that they were chosen by.

They are of the target's raw distribution: before temperature, filters, penalties, bias, `min_tokens` and grammars.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from dflash_jax.errors import InputError
from dflash_jax.models.head import Head

SIZES = (1, 5, 20, 128)  # likeliest tokens that are looked up: few sizes, so few compilations
MOST_LOGPROBS = SIZES[-1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowLogprobs:
    """Of each row's token, and the n likeliest in its place, descending."""

    own: Float32[Array, "B W"]
    top: Float32[Array, "B W n"]
    ids: Int32[Array, "B W n"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Those of the first `count` tokens of each request's output, with room for S."""

    count: Int32[Array, " B"]
    rows: RowLogprobs  # [B, S]

    @staticmethod
    def empty(batch: int, room: int, top: int) -> "Logprobs":
        """Of nothing yet."""
        shape = (batch, room, top)
        rows = RowLogprobs(jnp.zeros(shape[:2]), jnp.zeros(shape), jnp.zeros(shape, jnp.int32))
        return Logprobs(jnp.zeros(batch, jnp.int32), rows)

    def read(self, head: Head, hidden: Float[Array, "B W D"], tokens: Int32[Array, "B W"]) -> RowLogprobs:
        """Of `tokens` after the rows of `hidden`; -inf for tokens of -1. No logits are kept but the likeliest."""
        ones = jnp.ones(hidden.shape[0])
        out = head.sample(hidden, tokens[..., None], ones, slots=self.rows.ids.shape[-1])
        assert out.given is not None and out.total is not None
        total = out.values[..., :1] + jnp.log(out.total)[..., None]
        return RowLogprobs((out.given - total)[..., 0], out.values - total, out.ids)

    def add(self, new: RowLogprobs, emitted: Int[Array, " B"]) -> "Logprobs":
        """With the first `emitted[b]` rows of `new` behind those that are there."""
        put = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
        rows = jax.tree.map(lambda old, rows: put(old, rows, self.count, 0), self.rows, new)
        return Logprobs(self.count + emitted, rows)


def check_logprobs(count: object, most: int, name: str = "logprobs") -> int | None:
    """Return how many likely tokens are asked for, under `name`. InputError for anything but None or 0 to `most`."""
    if count is None:
        return None
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 0 <= count <= most:
        raise InputError(f"{name} is {count!r}; give None, or how many likely tokens to name, 0 to {most}")
    return int(count)


def looked_up(count: int | None, vocab: int) -> int:
    """The size to compile for `count` likely tokens; 0 for None."""
    return 0 if count is None else min(vocab, next(size for size in SIZES if size >= count))
