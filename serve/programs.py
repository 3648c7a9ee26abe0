"""The device's state and its compiled programs, as the engine calls them. `warmup` compiles them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from dflash_jax.cache import KeyValues, Recurrence
from dflash_jax.decoding.proposal import Proposal
from dflash_jax.decoding.sampling import Sampling
from dflash_jax.pair import Pair
from serve import device, masked, steps
from serve.config import Plan, Resolved
from serve.device import Admission, Sizes, Slots
from serve.grammar import everything_allowed
from serve.pages import Memory
from serve.requests import Running
from serve.scheduler import Chunk


def _empty(pair: Pair, sizes: Sizes) -> partial[Slots]:
    drafter = None if pair.drafter is None or sizes.width == 1 else pair.drafter.config
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

    @property
    def _split(self) -> tuple[Any, Any]:
        """The models that run: without the drafter where nothing is drafted."""
        return self.pair.split if self.sizes.width > 1 else self.pair.split_target

    def clear(self) -> None:
        """Forget all requests."""
        self.state = self._fresh()

    def _fresh(self) -> Slots:
        with self.pair.on_mesh():
            return _empty(self.pair, self.sizes)()

    def admit(self, r: Running, checkpoint: int | None) -> None:
        """Put a request into its slot."""
        words = None if r.matcher is None else r.matcher.masks((), 1)[0]
        self.put(
            r.slot, r.tokens, r.pages, prompt=len(r.prompt), limit=r.limit, stops=r.stops, cached=r.prefilled,
            checkpoint=checkpoint, sampling=r.sampling, words=words,
        )  # fmt: skip

    def put(
        self, slot: int, known: Sequence[int], pages: Sequence[int], *, prompt: int, limit: int, stops: np.ndarray,
        cached: int, checkpoint: int | None, sampling: Sampling, words: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """The same with all that an `Admission` says; no `words` leave nothing out."""
        tokens, table = np.zeros(self.sizes.room, np.int32), np.full(self.sizes.table, -1, np.int32)
        tokens[: len(known)], table[: len(pages)] = known, pages
        numbers = {
            "slot": slot, "prompt": prompt, "known": len(known), "limit": limit, "cached": cached,
            "checkpoint": -1 if checkpoint is None else checkpoint,
        }  # fmt: skip
        made: dict[str, Any] = {name: np.int32(value) for name, value in numbers.items()}
        made |= {"tokens": tokens, "pages": table, "stops": stops, "sampling": self._settings(sampling)}
        made["words"] = self._no_mask if words is None else words
        with self.pair.on_mesh():
            self.state = device.admit(self.state, Admission(**made))

    def _settings(self, sampling: Sampling) -> Sampling:
        bias: Any = None
        if self.sizes.settings:
            bias = self._no_bias if sampling.logit_bias is None else sampling.logit_bias
        return replace(sampling, logit_bias=bias, plan=self.state.sampling.plan)

    def prefill(
        self, shape: tuple[int, int], chunks: Sequence[Chunk], scored: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Run chunks of prompts; the news, a row each, and log-probabilities where one of them asks for these."""
        order = np.zeros((4, shape[0]), np.int32)
        order[0], order[3] = self.sizes.slots, self.sizes.checkpoints
        for i, chunk in enumerate(chunks):
            save = self.sizes.checkpoints if chunk.save is None else chunk.save
            order[:, i] = chunk.running.slot, chunk.count, chunk.kind, save
        with self.pair.on_mesh():
            self.state, news, scores = steps.run_prefill(
                *self._split, self.state, order, shape=shape, sizes=self.sizes, plan=self.config.everything,
                scored=scored or any(chunk.running.output.prompt_top is not None for chunk in chunks),
            )  # fmt: skip
        return news, scores

    def rounds(
        self, rows: Sequence[Running], deltas: Sequence[tuple[int, int, int]], plan: Plan
    ) -> tuple[list[int], jax.Array]:
        """Run rounds; which rows of the news are whose, and the news."""
        places, slots = self._placed(rows, plan)
        return places, self.run_rounds(slots, plan, deltas)

    def _placed(self, rows: Sequence[Running], plan: Plan) -> tuple[list[int], np.ndarray]:
        """Where requests are in a batch, and the slots of the whole batch."""
        slots = np.full(plan.bucket, self.sizes.slots, np.int32)
        # All slots at once stay in their places.
        places = [r.slot for r in rows] if plan.bucket == self.sizes.slots else list(range(len(rows)))
        slots[places] = [r.slot for r in rows]
        return places, slots

    def run_rounds(self, slots: np.ndarray, plan: Plan, deltas: Sequence[tuple[int, int, int]] = ()) -> jax.Array:
        """The same of a batch of slots, those past the last being none."""
        with self.pair.on_mesh():
            self.state, news = self._rounds(slots, plan, deltas)()
        return news

    def compile_rounds(self, plan: Plan) -> None:
        """Compile what `rounds` runs for a plan, which then is there at once. From any thread, while nothing runs."""
        call = self._rounds(self._placed((), plan)[1], plan, ())
        with self.pair.on_mesh():
            steps.rounds_for(plan.bucket).lower(*call.args, **call.keywords).compile()

    def _rounds(self, slots: np.ndarray, plan: Plan, deltas: Sequence[tuple[int, int, int]]) -> partial[Any]:
        order = np.concatenate([slots, [plan.rounds], self._changes(deltas)]).astype(np.int32)
        return partial(
            steps.rounds_for(plan.bucket), *self._split, self.state, order, bucket=plan.bucket,
            sizes=self.sizes, width=plan.width, plan=plan.settings,
        )  # fmt: skip

    def _changes(self, deltas: Sequence[tuple[int, int, int]]) -> np.ndarray:
        changes = np.full((self.sizes.deltas, 3), self.sizes.slots, np.int32)
        changes[: len(deltas)] = np.asarray(deltas, np.int32).reshape(-1, 3)
        return changes.reshape(-1)

    def propose(self, rows: Sequence[Running], plan: Plan) -> Drafted:
        """Draft for requests with grammars."""
        places, slots = self._placed(rows, plan)
        with self.pair.on_mesh():
            self.state, proposal = masked.run_proposal(
                *self._split,
                self.state,
                slots,
                bucket=plan.bucket,
                sizes=self.sizes,
                width=plan.width,
                plan=plan.settings,
            )
        return Drafted(plan, places, slots, proposal)

    def check(self, drafted: Drafted, masks: Sequence[np.ndarray], deltas: Sequence[tuple[int, int, int]]) -> jax.Array:
        """Verify what was drafted, under the masks [W, N] of each request; the news."""
        plan = drafted.plan
        words = everything_allowed(self.pair.target.config.vocab_size, plan.bucket, plan.width)
        for place, mask in zip(drafted.places, masks, strict=True):
            words[place] = mask
        order = np.concatenate([drafted.slots, self._changes(deltas)]).astype(np.int32)
        with self.pair.on_mesh():
            self.state, news = masked.run_check(
                *self._split, self.state, drafted.proposal, words, order, bucket=plan.bucket, sizes=self.sizes,
                width=plan.width, plan=plan.settings,
            )  # fmt: skip
        return news
