"""What the host sees of a running batch: generations, and pieces of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dflash_jax.text import Tokenizer, Transcript

HostLogprobs = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # own [T], top [T, n] and ids [T, n], as `RowLogprobs` has them


@dataclass(frozen=True)
class TokenLogprobs:
    """An emitted token's natural log-probability, and the likeliest (token, log-probability) in its place, descending.

    Of the target's raw distribution, as the OpenAI API has it: before temperature, filters, penalties, bias,
    `min_tokens` and grammars.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Generation:
    """What one prompt became.

    tokens: generated ids, an ending stop token included. text: their text, cut before a stop string.
    acceptance_lengths: tokens emitted in each round, the bonus included. The first token comes from the prefill.
    finish_reason: "stop" (a stop token or string) or "length" (`max_new_tokens`, or the model's last position).
    logprobs: of each token, where they were asked for.
    prompt_logprobs: of each token of the prompt but the first, where they were asked for.
    """

    tokens: list[int]
    text: str
    acceptance_lengths: list[int]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """A part of a stream: its text, its tokens, which of these the drafter had right, and their log-probabilities.

    The first one brings those of the prompt, where they were asked for.
    """

    text: str
    tokens: list[int]
    drafted: list[bool]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


class Output:
    """The host's view of one request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_length: int,
        stop_texts: Sequence[str],
        ends: set[int],
        *,
        min_tokens: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ):
        """`logprobs` is how many likely tokens to name beside each token; None: no log-probabilities at all.

        `prompt_logprobs` is that of the prompt's tokens.
        """
        self.prompt_length, self.ends, self.top = prompt_length, ends, logprobs
        self.prompt_top = prompt_logprobs
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.transcript = Transcript(tokenizer, stop_texts, min_tokens)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.counts: list[int] = []
        self._drafted = [False]  # for each token, whether the drafter had it: all of a round but the bonus
        self.text = ""
        self._shown_tokens = self._shown_text = 0

    def update(self, tokens: np.ndarray, counts: np.ndarray, found: HostLogprobs | None = None) -> None:
        """Take in all that the device knows of this request, prompt included; `found` is of its output."""
        old = len(self.tokens)
        new = None if found is None else (found[0][old:], found[1][old:], found[2][old:])
        self.extend(tokens[self.prompt_length + old :].tolist(), counts[len(self.counts) :].tolist(), new)

    def extend(self, tokens: list[int], counts: list[int], found: HostLogprobs | None = None) -> None:
        """Take in new tokens, and the rounds that they come from; nothing more once a stop string was found."""
        if self.transcript.stopped:
            return
        text, kept = self.transcript.push(tokens)
        self.tokens += tokens[:kept]
        if found is not None and self.top is not None:
            self.logprobs += named(found, kept, self.top)
        self.text += text
        self.counts += counts
        for count in counts:
            self._drafted += [True] * (count - 1) + [False]

    def piece(self) -> Piece | None:
        """What is new since the last piece."""
        tokens, text = self.tokens[self._shown_tokens :], self.text[self._shown_text :]
        flags = self._drafted[self._shown_tokens : len(self.tokens)]
        logprobs = None if self.top is None else tuple(self.logprobs[self._shown_tokens :])
        prompt = None if self._shown_tokens else self._prompt()
        self._shown_tokens, self._shown_text = len(self.tokens), len(self.text)
        return Piece(text, tokens, flags, logprobs, prompt) if tokens or text else None

    def _prompt(self) -> tuple[TokenLogprobs, ...] | None:
        return None if self.prompt_top is None else tuple(self.prompt_logprobs)

    def score(self, start: int, found: HostLogprobs) -> None:
        """Take in the prompt's tokens from `start` on, but for those that are known: a prompt may be run twice."""
        if self.prompt_top is not None:
            new = max(1 + len(self.prompt_logprobs) - start, 0)  # the first token has none
            left = [x[new : max(self.prompt_length - start, 0)] for x in found]
            self.prompt_logprobs += named((left[0], left[1], left[2]), len(left[0]), self.prompt_top)

    def generation(self) -> Generation:
        self.text += self.transcript.flush()
        lengths, left = [], len(self.tokens) - 1
        for count in self.counts:
            if left > 0:
                lengths.append(min(count, left))
            left -= count
        stopped = self.transcript.stopped or (bool(self.tokens) and self.tokens[-1] in self.ends)
        logprobs = None if self.top is None else tuple(self.logprobs)
        reason = "stop" if stopped else "length"
        return Generation(list(self.tokens), self.text, lengths, reason, logprobs, self._prompt())


def named(found: HostLogprobs, kept: int, count: int) -> list[TokenLogprobs]:
    """Of the first `kept` tokens, with the `count` likeliest beside each."""
    own, top, ids = (x[:kept] for x in found)
    each = zip(own.tolist(), ids[:, :count].tolist(), top[:, :count].tolist(), strict=True)
    return [TokenLogprobs(value, tuple(zip(tokens, values, strict=True))) for value, tokens, values in each]
