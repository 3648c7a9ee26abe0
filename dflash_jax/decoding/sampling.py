"""Sampling settings of a batch, and the target's distribution under them, row by row.

Order: bias, repetition, frequency and presence penalty, temperature, top-k, top-p, min-p (the last four as transformers
has them). A batch mixes requests freely: each setting has a neutral value that leaves the numbers of a row exactly as
they are, so the static `SamplingPlan` (which steps are compiled at all) changes the cost and never a result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from dflash_jax.decoding.logprobs import MOST_LOGPROBS, check_logprobs, looked_up
from dflash_jax.errors import InputError

LARGEST_TOP_K = 64  # that is drawn from the largest logits alone
SLOTS = (32, 128)  # how many of these are kept: few sizes, so few compilations


@dataclass(frozen=True)
class SamplingPlan:
    """Which steps some request of the batch needs. Static: a new plan is a new compilation."""

    random: bool = False
    filters: bool = False
    penalties: bool = False
    bias: bool = False
    min_tokens: bool = False
    logprobs: int = 0  # likely tokens to look up beside each emitted one; 0: not even its own log-probability
    slots: int = 0  # how many of the largest logits hold everything that the filters leave; 0: they need all

    @property
    def neutral(self) -> bool:
        """Whether only the largest logit counts."""
        return not (self.random or self.penalties or self.bias or self.min_tokens or self.logprobs)

    @property
    def whole(self) -> bool:
        """Whether whole rows of logits are needed."""
        return self.penalties or self.bias or (self.random and self.filters and not self.slots)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Settings of B requests, made by `Sampling.build`, which checks them. None in its place is plain greedy."""

    temperature: Float32[Array, " B"]  # 0 is greedy
    top_k: Int32[Array, " B"]  # 0 is off
    top_p: Float32[Array, " B"]  # 1 is off
    min_p: Float32[Array, " B"]  # 0 is off
    repetition_penalty: Float32[Array, " B"]  # 1 is off
    presence_penalty: Float32[Array, " B"]
    frequency_penalty: Float32[Array, " B"]
    min_tokens: Int32[Array, " B"]  # of the output, before a stop token can be chosen
    seed: UInt32[Array, " B"]
    logit_bias: Float32[Array, "B V"] | None
    plan: SamplingPlan = field(metadata={"static": True})

    @staticmethod
    def build(batch: int, vocab: int, **settings: Any) -> "Sampling | None":
        """The settings of a batch, as `pack` takes them, on the device.

        None where every request is greedy without penalties or bias: the rounds then only take an argmax.
        """
        packed = Sampling.pack(batch, vocab, **settings)
        return None if packed.plan.neutral else jax.tree.map(jnp.asarray, packed)

    @staticmethod
    def pack(
        batch: int,
        vocab: int,
        *,
        temperature: Any = 0.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
        min_p: Any = 0.0,
        repetition_penalty: Any = 1.0,
        presence_penalty: Any = 0.0,
        frequency_penalty: Any = 0.0,
        logit_bias: Any = None,
        min_tokens: Any = 0,
        logprobs: int | None = None,
        seed: Any = 0,
    ) -> "Sampling":
        """Check and pack the settings: each a scalar for the whole batch or a sequence of length `batch`.

        Requests with one seed and one prompt get one answer, whatever else is in the batch; give each a seed for more.
        `logit_bias` is {token id: bias}, or a sequence of such (or None) a request; `logprobs` is one for the batch.
        The arrays are numpy's.

        Raises InputError for a value out of its range or a sequence of another length.
        """
        values: dict[str, Any] = {
            "temperature": _floats(
                temperature, batch, "temperature", lambda x: x >= 0, "a finite number >= 0 (0 is greedy)"
            ),
            "top_k": _integers(top_k, batch, "top_k", 2**31 - 1, "(0 switches it off)"),
            "top_p": _floats(top_p, batch, "top_p", lambda x: 0 < x <= 1, "a number in (0, 1] (1 switches it off)"),
            "min_p": _floats(min_p, batch, "min_p", lambda x: 0 <= x <= 1, "a number in [0, 1] (0 switches it off)"),
            "repetition_penalty": _floats(
                repetition_penalty,
                batch,
                "repetition_penalty",
                lambda x: 1e-6 <= x <= 1e6,
                "a number from 1e-6 to 1e6 (1 switches it off)",
            ),
            "presence_penalty": _penalty(presence_penalty, batch, "presence_penalty"),
            "frequency_penalty": _penalty(frequency_penalty, batch, "frequency_penalty"),
            "min_tokens": _integers(min_tokens, batch, "min_tokens", 2**31 - 1, "(0 switches it off)"),
        }
        seeds = _integers(seed, batch, "seed", 2**32 - 1)
        bias = _bias(logit_bias, batch, vocab)
        plan = SamplingPlan(
            random=bool(np.any(values["temperature"] > 0)),
            filters=any(bool(np.any(values[name] != off)) for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0))),
            penalties=bool(np.any(values["repetition_penalty"] != 1))
            or bool(np.any(values["presence_penalty"]) or np.any(values["frequency_penalty"])),
            bias=bias is not None,
            min_tokens=bool(np.any(values["min_tokens"] > 0)),
            logprobs=looked_up(check_logprobs(logprobs, min(vocab, MOST_LOGPROBS)), vocab),
        )
        if plan.filters and not (plan.penalties or plan.bias):
            plan = replace(plan, slots=_slots(values["top_k"][values["temperature"] > 0]))
        return Sampling(**values, seed=seeds, logit_bias=bias, plan=plan)  # pyrefly: ignore[bad-argument-type]


def _slots(top_k: np.ndarray) -> int:
    """The smallest size that is more than every top-k (so ties that do not fit are seen), or 0 where one is off."""
    if not top_k.size or not np.all((top_k > 0) & (top_k <= LARGEST_TOP_K)):
        return 0
    return next(size for size in SLOTS if size > top_k.max())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What the penalties look at: the tokens of the prompt, and the generated ones up to and including the anchor."""

    prompt_seen: Bool[Array, "B V"]
    counts: Int32[Array, "B V"]

    @staticmethod
    def start(prompts: Int32[Array, "B T"], lengths: Int32[Array, " B"], vocab: int) -> "History":
        """The history before the first generated token; a prompt's tokens from its length on are padding."""
        batch, width = prompts.shape
        ids = jnp.where(jnp.arange(width) < lengths[:, None], prompts, vocab)
        seen = jnp.zeros((batch, vocab), bool).at[jnp.arange(batch)[:, None], ids].set(True, mode="drop")
        return History(prompt_seen=seen, counts=jnp.zeros((batch, vocab), jnp.int32))

    def add(self, tokens: Int32[Array, "B N"], mask: Bool[Array, "B N"]) -> "History":
        """The history after the emitted tokens where `mask` holds; negative tokens are ignored."""
        batch, vocab = self.counts.shape
        ids = jnp.where(mask & (tokens >= 0), tokens, vocab)
        counts = self.counts.at[jnp.arange(batch)[:, None], ids].add(1, mode="drop")
        return History(prompt_seen=self.prompt_seen, counts=counts)


def row_counts(history: History, tokens: Int32[Array, "B W"]) -> Int32[Array, "B W V"]:
    """Generated tokens as each row of a proposal sees them: row i has the history's and the drafted rows 1..i."""
    drafted = jax.nn.one_hot(tokens.at[:, 0].set(-1), history.counts.shape[-1], dtype=jnp.int32)
    return history.counts[:, None] + jnp.cumsum(drafted, axis=1)


def adjusted(
    logits: Float32[Array, "B W V"],
    sampling: Sampling | None,
    history: History | None = None,
    tokens: Int32[Array, "B W"] | None = None,
) -> Float32[Array, "B W V"]:
    """Logits with the bias and with the penalties of each row's own history; their argmax is the greedy choice.

    `history` and the proposal's `tokens` are needed when `sampling.plan.penalties`, and ignored otherwise.
    """
    if sampling is None:
        return logits
    if sampling.logit_bias is not None:
        logits = logits + sampling.logit_bias[:, None]
    if sampling.plan.penalties:
        if history is None or tokens is None:
            raise ValueError("penalties need the history and the tokens of the rows")
        logits = _penalised(logits, sampling, history.prompt_seen[:, None], row_counts(history, tokens))
    return logits


def _penalised(logits: Array, sampling: Sampling, prompt_seen: Array, counts: Array) -> Array:
    factor = sampling.repetition_penalty[:, None, None]
    repeated = prompt_seen | (counts > 0)
    logits = jnp.where(repeated, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    logits = logits - sampling.frequency_penalty[:, None, None] * counts
    return logits - sampling.presence_penalty[:, None, None] * (counts > 0)


def is_random(sampling: Sampling) -> Bool[Array, "B 1 1"]:
    """Requests that draw at all."""
    return (sampling.temperature > 0)[:, None, None]


def temperature_of(sampling: Sampling) -> Float32[Array, " B"]:
    """The temperatures, 1 for greedy requests."""
    return jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)


def warm(logits: Float32[Array, "B W S"], sampling: Sampling) -> Float32[Array, "B W S"]:
    """Logits over temperature, at most 0."""
    # The maximum goes first: no temperature overflows, and the leading tokens keep all their digits.
    return -((jnp.max(logits, axis=-1, keepdims=True) - logits) / temperature_of(sampling)[:, None, None])


def filtered(logits: Float32[Array, "B W S"], sampling: Sampling) -> Float32[Array, "B W S"]:
    """Logits over temperature, at most 0, and -inf outside top-k, top-p and min-p. Equal logits stay or go together.

    A list of the largest logits will do, if it holds the whole top-k.
    """
    if not sampling.plan.filters:
        return warm(logits, sampling)
    distance = -warm(logits, sampling)
    vocab = logits.shape[-1]
    top_k = jnp.where(sampling.top_k == 0, vocab, jnp.minimum(sampling.top_k, vocab))[:, None, None]
    radius = _radius(distance, jnp.ones_like(distance), top_k.astype(jnp.float32))
    mass = jnp.where(distance <= radius, jnp.exp(-distance), 0.0)
    top_p = sampling.top_p[:, None, None]
    nucleus = _radius(distance, mass, top_p * jnp.sum(mass, axis=-1, keepdims=True))
    # Tokens too unlikely to change the sum are still part of everything.
    radius = jnp.where(top_p < 1, jnp.minimum(radius, nucleus), radius)
    radius = jnp.minimum(radius, -jnp.log(sampling.min_p)[:, None, None])
    return jnp.where(distance <= radius, -distance, -jnp.inf)


def _radius(distance: Array, weight: Array, goal: Array) -> Array:
    """The smallest r with sum(weight where distance <= r) >= goal, or inf: a bisection over the bits of r.

    Floats that are not negative are ordered as their bits are, so 31 halvings find r exactly. A sort takes several
    times as long for 150k tokens, and would have to put equal logits in some order.
    """
    infinity = int(np.float32(np.inf).view(np.int32))

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        inside = distance <= jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.sum(jnp.where(inside, weight, 0.0), axis=-1, keepdims=True) >= goal
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.zeros((*distance.shape[:-1], 1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, infinity)))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _entries(value: Any, batch: int, name: str) -> list[Any]:
    """One entry a request; a scalar is repeated."""
    if isinstance(value, (np.ndarray, jax.Array)):
        value = np.asarray(value).tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * batch
    if len(value) != batch:
        raise InputError(
            f"{name} has {len(value)} entries for {batch} requests; give one value, or one for each request"
        )
    return list(value)


def _floats(value: Any, batch: int, name: str, accepts: Callable[[Any], bool], accepted: str) -> np.ndarray:
    entries = _entries(value, batch, name)
    largest = float(np.finfo(np.float32).max)
    for entry in entries:
        number = isinstance(entry, (int, float, np.integer, np.floating)) and not isinstance(entry, bool)
        if not (number and abs(entry) <= largest and accepts(entry)):
            raise InputError(f"{name} is {entry!r}; give {accepted}")
    packed = np.asarray(entries, np.float32)
    # Subnormal numbers are zero on most accelerators, and must not be half zero.
    return np.where(np.abs(packed) < np.finfo(np.float32).tiny, np.float32(0), packed)


def _penalty(value: Any, batch: int, name: str) -> np.ndarray:
    return _floats(value, batch, name, lambda x: -2 <= x <= 2, "a number in [-2, 2] (0 switches it off)")


def _integers(value: Any, batch: int, name: str, largest: int, note: str = "") -> np.ndarray:
    entries = _entries(value, batch, name)
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, (int, np.integer)) or not 0 <= entry <= largest:
            raise InputError(f"{name} is {entry!r}; give an integer from 0 to {largest} {note}".rstrip())
    return np.asarray(entries, np.int64).astype(np.int32 if largest < 2**31 else np.uint32)


def _bias(value: Any, batch: int, vocab: int) -> np.ndarray | None:
    entries = [value] * batch if value is None or isinstance(value, Mapping) else _entries(value, batch, "logit_bias")
    bias = np.zeros((batch, vocab), np.float32)
    for row, entry in zip(bias, entries, strict=True):
        if entry is not None and not isinstance(entry, Mapping):
            raise InputError(
                f"logit_bias is {entry!r}; give {{token id: bias}}, or a sequence of such, one for each request"
            )
        for token, amount in (entry or {}).items():
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocab:
                raise InputError(
                    f"logit_bias names token {token!r}; give ids from 0 to {vocab - 1}, the target's vocabulary"
                )
            row[token] = _floats(
                amount, 1, f"logit_bias of token {token}", lambda x: abs(x) <= 1e9, "a number from -1e9 to 1e9"
            )[0]
    return bias if bias.any() else None
