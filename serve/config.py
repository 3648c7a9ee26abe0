"""How an engine is made: what its user says, and what follows from that and from the pair."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from dflash_jax.decoding.logprobs import MOST_LOGPROBS, check_logprobs, looked_up
from dflash_jax.decoding.sampling import SamplingPlan
from dflash_jax.decoding.width import usual_widths
from dflash_jax.errors import InputError
from dflash_jax.pair import Pair
from serve.device import Sizes

GREEDY = SamplingPlan()
DRAWN = SamplingPlan(random=True)
FILTERED = SamplingPlan(random=True, filters=True)
EVERYTHING = SamplingPlan(random=True, filters=True, penalties=True, bias=True, min_tokens=True)


# Tokens of a page, and passes over prompts: many rows are expensive on a CPU and next to free on an accelerator.
PAGE = {"cpu": 16, "accelerator": 64}
PREFILL = {"cpu": ((1, 32), (4, 32), (1, 128)), "accelerator": ((4, 64), (1, 256))}

MEMORY = 0.85  # of an accelerator's


@dataclass(frozen=True)
class EngineConfig:
    """Sizes are fixed at the start, and so is what is compiled.

    That is the rounds, buckets x widths x plans, one plan more with `logprobs`, four programs a bucket with `grammar`,
    and the prefills.
    """

    slots: int = 16  # requests that run at once
    max_length: int | None = None  # tokens of a request, prompt and output; None: the model's positions
    page_size: int | None = None  # tokens; None: 16 on the CPU, 64 on accelerators, what the kernels take
    pages: int | None = None  # None: as many as the memory budget allows, else enough for all slots at their longest
    memory_bytes: int | None = None  # for weights, caches and state, of each device; None: see `device_memory`
    checkpoints: int = 64  # recurrent states that the prefix cache may keep
    prefix_cache: bool = True
    buckets: tuple[int, ...] | None = None  # batch sizes; None: 1, 4, 16, ..., the slots, and on a CPU half of them
    draft: bool = True
    widths: tuple[int, ...] | None = None  # rows of a round; None: 1, half a block, a block
    adaptive: bool = True  # False: always the widest
    rounds: int = 8  # most rounds a dispatch
    rounds_while_filling: int = 2  # most while more prompts wait than have had their turn
    dispatch_ms: float = 25.0  # that a dispatch's rounds should take at most while prompts wait, or slots are free
    pass_ms: float = 250.0  # that a pass over prompts should take at most, where a narrower one does
    prefill: tuple[tuple[int, int], ...] | None = None  # (prompts, tokens of each) a pass; None: see `PREFILL`
    plans: tuple[SamplingPlan, ...] = (GREEDY, DRAWN, EVERYTHING)  # a dispatch takes the first that does for all
    logprobs: int = 0  # most likely tokens that a request may ask to be named beside each of its own; 0: no logprobs
    grammar: bool = True  # whether requests may have a grammar
    max_requests: int = 4096  # that wait or run


@dataclass(frozen=True)
class Plan:
    """How to run one dispatch of rounds."""

    bucket: int
    settings: SamplingPlan
    width: int
    rounds: int
    load: Hashable  # what the costs of this kind of dispatch are known under
    grammar: bool = False  # one round, between whose draft and check the host says what may come

    def of(self, *, rounds: int) -> "Plan":
        """The same with other rounds."""
        return replace(self, rounds=rounds)


@dataclass(frozen=True)
class Resolved:
    """A configuration with nothing left open."""

    sizes: Sizes
    buckets: tuple[int, ...]
    widths: tuple[int, ...]
    adaptive: bool
    rounds_while_filling: int
    dispatch_ms: float
    pass_ms: float
    prefill: tuple[tuple[int, int], ...]
    plans: tuple[SamplingPlan, ...]
    prefix_cache: bool
    max_requests: int
    logprobs: int

    @property
    def everything(self) -> SamplingPlan:
        """The plan that does most."""
        return max(self.plans, key=lambda p: (p.penalties, p.bias, p.min_tokens, p.filters, p.random, p.logprobs))

    def masked(self, bucket: int, width: int) -> Plan:
        """Return how requests with grammars run: with all settings, so that few programs are compiled."""
        return Plan(bucket, self.everything, width, 1, ("grammar", bucket), grammar=True)

    def plan_for(self, needs: Iterable[SamplingPlan]) -> SamplingPlan:
        """The cheapest compiled plan that does for all of some requests."""
        needed = list(needs)
        return next(plan for plan in self.plans if all(covers(plan, need) for need in needed))

    def check(self, logprobs: Mapping[str, int | None], need: SamplingPlan) -> None:
        """InputError for a request that asks for more than was compiled; `logprobs` by the names of its fields."""
        for name, count in logprobs.items():
            if count is not None and not self.logprobs:
                raise InputError(f"this engine was started without logprobs; leave {name} out")
            if count is not None and count > self.logprobs:
                raise InputError(f"{name} is {count}; this engine names at most {self.logprobs} tokens")
        if not any(covers(plan, need) for plan in self.plans):
            raise InputError("this engine was started without penalties, logit_bias and min_tokens; leave them out")

    @property
    def compiled(self) -> tuple[int, ...]:
        """Widths of rounds that are compiled; requests past the drafter's positions need plain ones."""
        return self.widths if self.adaptive else tuple(sorted({1, self.widths[-1]}))

    @property
    def masked_widths(self) -> tuple[int, ...]:
        """Widths of rounds with grammars."""
        return tuple(sorted({1, self.widths[-1]}))


def covers(plan: SamplingPlan, need: SamplingPlan) -> bool:
    """Whether rounds compiled for `plan` can serve a request that needs `need`."""
    pairs = (
        (plan.random, need.random), (plan.filters, need.filters and need.random),
        (plan.penalties, need.penalties), (plan.bias, need.bias), (plan.min_tokens, need.min_tokens),
        (plan.logprobs, need.logprobs),
    )  # fmt: skip
    return all(has or not wants for has, wants in pairs)


def resolve(pair: Pair, c: EngineConfig) -> Resolved:
    """Fill in what was left open. InputError for what cannot work."""
    from serve.programs import memory_of  # which needs this module

    kind: Any = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    page_size = PAGE[kind] if c.page_size is None else c.page_size
    prefill = PREFILL[kind] if c.prefill is None else c.prefill
    counts = {name: getattr(c, name) for name in ("slots", "rounds", "rounds_while_filling")}
    for name, value in (counts | {"page_size": page_size}).items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise InputError(f"{name} is {value!r}; give a whole number of at least 1")
    for name, value in (("dispatch_ms", c.dispatch_ms), ("pass_ms", c.pass_ms)):
        if not value > 0:
            raise InputError(f"{name} is {value!r}; give milliseconds above 0")
    longest = pair.target.config.max_position or 4096
    length = longest if c.max_length is None else c.max_length
    if not 2 <= length <= longest:
        raise InputError(f"max_length is {length}; give 2 to {longest}, the model's positions")
    if pair.batch_multiple > 1:
        raise InputError(
            f"the mesh spreads the batch over {pair.batch_multiple} devices, and the pages of an engine are of no one "
            "sequence; give a mesh of expert and tensor, and more replicas for more requests"
        )
    widths = _widths(pair, c)
    buckets = _buckets(c)
    if any(tokens % page_size for _, tokens in prefill) and c.prefix_cache:
        raise InputError(f"a prefill of {prefill} does not end where pages of {page_size} do; give multiples")
    plans, vocab = c.plans, pair.target.config.vocab_size
    check_logprobs(c.logprobs, min(vocab, MOST_LOGPROBS))
    if not any(covers(plan, SamplingPlan(random=True, filters=True)) for plan in plans) or not plans[0].neutral:
        raise InputError("the first of the plans is greedy, and one of them has to take temperature and filters")
    settings = any(plan.penalties or plan.bias for plan in plans)
    least = -(-length // page_size)
    pages = c.pages or c.slots * least + 1  # one more: see `Scheduler.admit`
    sizes = Sizes(c.slots, length, widths[-1], c.rounds, pages, page_size, c.checkpoints, settings, c.grammar)
    budget = device_memory() if c.memory_bytes is None and c.pages is None else c.memory_bytes
    if budget is not None:
        within = memory_of(pair, sizes).pages_within(budget, least)
        sizes = replace(sizes, pages=min(within, sizes.pages))
    if sizes.pages < least + 1:
        raise InputError(f"there are {sizes.pages} pages of {page_size}; give at least {least + 1}: max_length and one")
    made = Resolved(
        sizes, buckets, widths, c.adaptive and len(widths) > 1, c.rounds_while_filling, c.dispatch_ms, c.pass_ms,
        tuple(sorted(prefill, key=lambda s: (s[1], s[0]))), plans, c.prefix_cache, c.max_requests, c.logprobs,
    )  # fmt: skip
    if not c.logprobs:
        return made
    return replace(made, plans=(*plans, replace(made.everything, logprobs=looked_up(c.logprobs, vocab))))


def device_memory() -> int | None:
    """What of its memory a device has for weights, caches and state beside what programs need; None where unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(MEMORY * stats["bytes_limit"]) if "bytes_limit" in stats else None


def _widths(pair: Pair, c: EngineConfig) -> tuple[int, ...]:
    if pair.drafter is None or not c.draft:
        return (1,)
    block = pair.drafter.config.block_size
    widths = c.widths or usual_widths(block)
    if any(not 1 <= w <= block for w in widths) or not widths:
        raise InputError(f"widths are {widths}; give whole numbers from 1 to {block}, the drafter's block size")
    return tuple(sorted({1, *widths}))


def _buckets(c: EngineConfig) -> tuple[int, ...]:
    if c.buckets is None:
        # On a CPU empty rows cost as much as others do.
        half = [max(1, c.slots // 2)] if jax.default_backend() == "cpu" else []
        return tuple(sorted({*(4**i for i in range(16) if 4**i < c.slots), *half, c.slots}))
    if not all(1 <= b <= c.slots for b in c.buckets) or c.slots not in c.buckets:
        raise InputError(f"buckets are {c.buckets}; give sizes up to the slots, {c.slots}, which has to be one of them")
    return tuple(sorted(set(c.buckets)))
