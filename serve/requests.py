"""A request as its sender sees it, and as the engine does."""

import logging
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dflash_jax.decoding.output import Generation, Output, Piece
from dflash_jax.decoding.sampling import Sampling
from dflash_jax.decoding.width import Text
from dflash_jax.text import Prompt
from serve.grammar import Grammar, Matcher

Event = Piece | Generation | Exception  # pieces, then one of the others


@dataclass(frozen=True)
class Request:
    """What to complete, and how: the arguments of `dflash_jax.generate` for one prompt."""

    prompt: Prompt
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int = 0
    stop: Any = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # how many likely tokens to name beside each of the prompt's; None: none at all
    grammar: Grammar | None = None  # what the output has to match; its end ends the request
    ignore_eos: bool = False  # whether the model's own end tokens are tokens like others
    cache_salt: str = ""  # only prompts with the same one share pages of the prefix cache

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `Sampling.pack`."""
        names = (
            "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "logit_bias", "min_tokens", "seed",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Usage:
    """What a request took."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    drafted_tokens: int
    accepted_tokens: int  # of the drafted ones


def _nowhere(event: Event) -> None:
    """Whoever listened has failed."""


class Handle:
    """A request on its way: iterate over it for pieces, or wait for the `result`.

    `deliver`, if given, is called with each event instead, by the engine's thread: it must be quick. One that raises
    ends its request, and is not called again.
    """

    def __init__(self, request: Request, cancel: Callable[["Handle"], None], deliver: Callable[[Event], None] | None):
        self.request = request
        self.submitted = time.perf_counter()
        self.first: float | None = None  # when the first token was there
        self.finished: float | None = None
        self.usage: Usage | None = None  # at the end
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deliver = deliver or self._events.put
        self._end: Event | None = None

    def put(self, event: Event) -> None:
        """For the engine: the next event."""
        now = time.perf_counter()
        self.first = now if self.first is None else self.first
        if not isinstance(event, Piece):
            self.finished = now
        try:
            self._deliver(event)
        except Exception:  # the sender's mistake, which is nobody else's
            logging.getLogger(__name__).exception("the delivery of a request's event has failed; it is cancelled")
            self._deliver = _nowhere
            self.cancel()

    def cancel(self) -> None:
        """End the request soon, wherever it is; its generation then has the finish reason "cancelled"."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Piece]:
        while self._end is None:
            event = self._events.get()
            if isinstance(event, Piece):
                yield event
            else:
                self._end = event
        if isinstance(self._end, Exception):
            raise self._end

    def result(self) -> Generation:
        """The whole generation, once it is there. Raises what went wrong."""
        for _ in self:
            pass
        assert isinstance(self._end, Generation)
        return self._end


@dataclass(eq=False)
class Running:
    """The engine's side of a request. Lengths are in tokens, prompt included."""

    handle: Handle
    order: int  # of arrival
    prompt: list[int]
    limit: int
    stops: np.ndarray  # ids, padded
    sampling: Sampling  # of one request, on the host
    output: Output
    text: Text  # how often its drafts are right
    salt: str = ""  # see `Request.cache_salt`
    matcher: Matcher | None = None  # where the output stands in its grammar
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    goal: int = 0  # tokens to prefill
    prefilled: int = 0  # of these, dispatched or cached
    passed: int = 0  # passes since its last one in which a prompt that came later went first
    cuts: tuple[int, ...] = ()  # where to keep the recurrent state
    least: int = 0  # tokens known for certain once all that is in flight has arrived
    most: int = 0  # and how many there can be
    behind: int = 0  # committed rows that the drafter has not read, when the device was last heard of
    cached: int = 0  # tokens of the prompt that were found in the prefix cache at first
    drafted: int = 0
    accepted: int = 0
    done: bool = False

    @property
    def tokens(self) -> list[int]:
        """All that the host knows."""
        return self.prompt + self.output.tokens

    @property
    def decoding(self) -> bool:
        """Whether its rounds can be dispatched."""
        return self.slot >= 0 and self.prefilled == self.goal and self.least < self.limit

    @property
    def waits_for_prefill(self) -> bool:
        return self.slot >= 0 and self.prefilled < self.goal

    def take_slot(self, slot: int) -> None:
        """Begin, or begin again, in a slot: everything known but the last token of an output has to be prefilled."""
        known = len(self.prompt) + len(self.output.tokens)
        self.slot, self.least, self.most, self.behind, self.passed = slot, known, known, 0, 0
        self.goal = known - 1 if self.output.tokens else known

    @property
    def settled(self) -> bool:
        """Whether the host knows all that the device does."""
        return self.least == self.most == len(self.prompt) + len(self.output.tokens)

    def finish(self, reason: str | Exception | None = None) -> None:
        """Tell the sender; `reason` replaces the generation's own, or says what went wrong."""
        self.done = True
        if isinstance(reason, Exception):
            self.handle.put(reason)
            return
        generation = self.output.generation()
        if piece := self.output.piece():
            self.handle.put(piece)
        self.handle.usage = Usage(len(self.prompt), self.cached, self.drafted, self.accepted)
        self.handle.put(generation if reason is None else replace(generation, finish_reason=reason))
