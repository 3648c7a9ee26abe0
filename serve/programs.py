"""The device's state and its compiled programs, as the engine calls them. All is compiled before the first request."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.cache import KeyValues, Recurrence
from dflash_jax.decoding.proposal import Proposal
from dflash_jax.decoding.sampling import Sampling
from dflash_jax.decoding.width import WidthController
from dflash_jax.pair import Pair
from serve import device, masked, steps
from serve.config import Plan, Resolved
from serve.device import Admission, Sizes, Slots
from serve.grammar import everything_allowed
from serve.pages import Memory
from serve.requests import Running
from serve.scheduler import Chunk

TIMED_ROUNDS, TIMED_RUNS = 4, 3  # of each kind at the start, to know what a round costs


def _empty(pair: Pair, sizes: Sizes) -> partial[Slots]:
    drafter = None if pair.drafter is None else pair.drafter.config
    return partial(device.empty, pair.target.config, drafter, pair.target.embed.embedding.dtype, sizes)


def memory_of(pair: Pair, sizes: Sizes) -> Memory:
    """What an engine of these sizes keeps on each device."""
    with pair.on_mesh():
        lowered = jax.jit(_empty(pair, sizes)).lower()
    where = lowered.compile().output_shardings
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), lowered.out_info, where)
    drafted = () if state.decode.draft_cache is None else state.decode.draft_cache.layers
    pools = [x for x in (*state.decode.cache.layers, *drafted) if isinstance(x, KeyValues)]
    page = device.bytes_of(pools) // sizes.pages
    checkpoints = device.bytes_of(state.checkpoints)
    slots = device.bytes_of(state) - page * sizes.pages - checkpoints
    return Memory(device.bytes_of(pair.split[1]), slots, checkpoints, page, sizes.pages)


@dataclass(frozen=True)
class Drafted:
    """Drafts of requests with grammars, on their way."""

    plan: Plan
    places: list[int]  # rows of the batch that the requests are in
    slots: np.ndarray  # of the whole batch
    proposal: Proposal

    def tokens(self) -> list[list[int]]:
        """What was drafted for each request: waits for it."""
        rows = jax.device_get(self.proposal.tokens)
        return [rows[place, 1:].tolist() for place in self.places]


class Programs:
    """Calls that return at once: what they return is on its way."""

    def __init__(self, pair: Pair, config: Resolved):
        self.pair, self.config, self.sizes = pair, config, config.sizes
        self.state = self._fresh()
        self.recurrent = any(isinstance(x, Recurrence) for x in self.state.decode.cache.layers)
        self._no_bias = np.zeros((1, pair.target.config.vocab_size), np.float32)
        self._no_mask = everything_allowed(pair.target.config.vocab_size) if self.sizes.grammar else None

    def _fresh(self) -> Slots:
        with self.pair.on_mesh():
            return _empty(self.pair, self.sizes)()

    def admit(self, r: Running, checkpoint: int | None) -> None:
        """Put a request into its slot."""
        words = self._no_mask if r.matcher is None else r.matcher.masks((), 1)[0]
        self._admit(
            r.slot, r.tokens, r.pages, len(r.prompt), r.limit, r.stops, r.prefilled, checkpoint, r.sampling, words
        )

    def _admit(
        self, slot: int, known: Sequence[int], pages: Sequence[int], prompt: int, limit: int, stops: np.ndarray,
        cached: int, checkpoint: int | None, sampling: Sampling, words: np.ndarray | None,
    ) -> None:  # fmt: skip
        tokens, table = np.zeros(self.sizes.room, np.int32), np.full(self.sizes.table, -1, np.int32)
        tokens[: len(known)], table[: len(pages)] = known, pages
        numbers = {
            "slot": slot, "prompt": prompt, "known": len(known), "limit": limit, "cached": cached,
            "checkpoint": -1 if checkpoint is None else checkpoint,
        }  # fmt: skip
        made: dict[str, Any] = {name: np.int32(value) for name, value in numbers.items()}
        made |= {"tokens": tokens, "pages": table, "stops": stops, "sampling": self._settings(sampling), "words": words}
        with self.pair.on_mesh():
            self.state = device.admit(self.state, Admission(**made))

    def _settings(self, sampling: Sampling) -> Sampling:
        bias: Any = None
        if self.sizes.settings:
            bias = self._no_bias if sampling.logit_bias is None else sampling.logit_bias
        return replace(sampling, logit_bias=bias, plan=self.state.sampling.plan)

    def prefill(self, shape: tuple[int, int], chunks: Sequence[Chunk]) -> jax.Array:
        """Run chunks of prompts; the news, a row each."""
        order = np.zeros((4, shape[0]), np.int32)
        order[0], order[3] = self.sizes.slots, self.sizes.checkpoints
        for i, chunk in enumerate(chunks):
            save = self.sizes.checkpoints if chunk.save is None else chunk.save
            order[:, i] = chunk.running.slot, chunk.count, chunk.kind, save
        return self._run_prefill(order, shape)

    def _run_prefill(self, order: np.ndarray, shape: tuple[int, int]) -> jax.Array:
        split = self.pair.split if self.config.modes[1:] else self.pair.split_target
        with self.pair.on_mesh():
            self.state, news = steps.run_prefill(
                *split, self.state, order, shape=shape, sizes=self.sizes, plan=self.config.everything
            )
        return news

    def rounds(
        self, rows: Sequence[Running], deltas: Sequence[tuple[int, int, int]], plan: Plan
    ) -> tuple[list[int], jax.Array]:
        """Run rounds; which rows of the news are whose, and the news."""
        places, slots = self._placed(rows, plan)
        return places, self._run_rounds(slots, plan, deltas)

    def _placed(self, rows: Sequence[Running], plan: Plan) -> tuple[list[int], np.ndarray]:
        """Where requests are in a batch, and the slots of the whole batch."""
        slots = np.full(plan.bucket, self.sizes.slots, np.int32)
        # All slots at once stay in their places.
        places = [r.slot for r in rows] if plan.bucket == self.sizes.slots else list(range(len(rows)))
        slots[places] = [r.slot for r in rows]
        return places, slots

    def _run_rounds(self, slots: np.ndarray, plan: Plan, deltas: Sequence[tuple[int, int, int]] = ()) -> jax.Array:
        order = np.concatenate([slots, [plan.rounds, plan.leave], self._changes(deltas)]).astype(np.int32)
        split = self.pair.split if plan.draft else self.pair.split_target
        with self.pair.on_mesh():
            self.state, news = steps.run_rounds(
                *split, self.state, order, bucket=plan.bucket, sizes=self.sizes, width=plan.width,
                plan=plan.settings, draft=plan.draft,
            )  # fmt: skip
        return news

    def _changes(self, deltas: Sequence[tuple[int, int, int]]) -> np.ndarray:
        changes = np.full((self.sizes.deltas, 3), self.sizes.slots, np.int32)
        changes[: len(deltas)] = np.asarray(deltas, np.int32).reshape(-1, 3)
        return changes.reshape(-1)

    def propose(self, rows: Sequence[Running], plan: Plan) -> "Drafted":
        """Draft for requests with grammars."""
        places, slots = self._placed(rows, plan)
        return Drafted(plan, places, slots, self._run_proposal(slots, plan))

    def _run_proposal(self, slots: np.ndarray, plan: Plan) -> Proposal:
        split = self.pair.split if plan.draft else self.pair.split_target
        with self.pair.on_mesh():
            return masked.run_proposal(
                *split, self.state, slots, bucket=plan.bucket, sizes=self.sizes, width=plan.width, plan=plan.settings
            )

    def check(
        self, drafted: "Drafted", masks: Sequence[np.ndarray], deltas: Sequence[tuple[int, int, int]]
    ) -> jax.Array:
        """Verify what was drafted, under the masks [W, N] of each request; the news."""
        plan = drafted.plan
        words = everything_allowed(self.pair.target.config.vocab_size, plan.bucket, plan.width)
        for place, mask in zip(drafted.places, masks, strict=True):
            words[place] = mask
        return self._run_check(drafted.slots, plan, drafted.proposal, words, deltas)

    def _run_check(
        self, slots: np.ndarray, plan: Plan, proposal: Proposal, words: np.ndarray,
        deltas: Sequence[tuple[int, int, int]] = (),
    ) -> jax.Array:  # fmt: skip
        order = np.concatenate([slots, self._changes(deltas)]).astype(np.int32)
        split = self.pair.split if plan.draft else self.pair.split_target
        with self.pair.on_mesh():
            self.state, news = masked.run_check(
                *split, self.state, proposal, words, order, bucket=plan.bucket, sizes=self.sizes, width=plan.width,
                plan=plan.settings,
            )  # fmt: skip
        return news

    def warm_up(self, controller: WidthController) -> None:
        """Compile every program, and time the rounds so that the controller knows what they cost."""
        for shape in self.config.prefill:
            order = np.zeros((4, shape[0]), np.int32)
            order[0], order[3] = self.sizes.slots, self.sizes.checkpoints
            self._run_prefill(order, shape)
        nobody = Sampling.pack(1, self.pair.target.config.vocab_size)
        self._admit(0, [0], [], 1, 1, np.full(device.STOPS, -1, np.int32), 0, None, nobody, self._no_mask)
        none = self.sizes.slots
        for bucket in self.config.buckets:
            for width, draft in self.config.modes:
                for settings in self.config.plans:
                    self._run_rounds(np.full(bucket, none, np.int32), Plan(bucket, settings, width, draft, 1, False, 0))
            if self.sizes.grammar:
                plan, slots = self.config.masked(bucket), np.full(bucket, none, np.int32)
                self.check(Drafted(plan, [], slots, self._run_proposal(slots, plan)), [], [])
            if self.config.adaptive:
                costs = self._costs(bucket)
                for settings in self.config.plans:
                    controller.assume_costs((settings, bucket), costs)
        self.state = self._fresh()

    def _costs(self, bucket: int) -> dict[int, float]:
        """Seconds a round by width, of requests that have just begun."""
        costs: dict[int, float] = {}
        slots = np.arange(bucket, dtype=np.int32)
        for width, draft in self.config.modes:
            if (width, True) in self.config.modes and not draft:
                continue
            plan = Plan(bucket, self.config.plans[0], width, draft, TIMED_ROUNDS, False, 0)
            times = []
            for _ in range(TIMED_RUNS):
                self.state = jax.block_until_ready(_begun(self.state))
                start = time.perf_counter()
                jax.block_until_ready(self._run_rounds(slots, plan))
                times.append(time.perf_counter() - start)
            costs[width] = min(times) / TIMED_ROUNDS
        return costs


@partial(jax.jit, donate_argnames=("state",))
def _begun(state: Slots) -> Slots:
    """All slots with a request that runs, for timing: its pages are none."""
    d: Any = state.decode
    ones = jnp.ones_like(d.known)
    cache = replace(d.cache, lengths=jnp.zeros_like(d.cache.lengths))
    decode = replace(d, cache=cache, known=ones, limit=ones * d.tokens.shape[1], finished=jnp.zeros_like(d.finished))
    return replace(state, decode=decode).laid_out()
