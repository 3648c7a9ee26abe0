"""What the host sees of a running batch: generations, and pieces of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dflash_jax.text import Tokenizer, Transcript


@dataclass(frozen=True)
class Generation:
    """What one prompt became.

    tokens: generated ids, an ending stop token included. text: their text, cut before a stop string.
    acceptance_lengths: tokens emitted in each round, the bonus included. The first token comes from the prefill.
    finish_reason: "stop" (a stop token or string) or "length" (`max_new_tokens`, or the model's last position).
    """

    tokens: list[int]
    text: str
    acceptance_lengths: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Piece:
    """A part of a stream: its text, its tokens, and which of these the drafter had right."""

    text: str
    tokens: list[int]
    drafted: list[bool]


class Output:
    """The host's view of one request."""

    def __init__(self, tokenizer: Tokenizer, prompt_length: int, stop_texts: Sequence[str], ends: set[int]):
        self.prompt_length, self.ends = prompt_length, ends
        self.transcript = Transcript(tokenizer, stop_texts)
        self.tokens: list[int] = []
        self.counts: list[int] = []
        self.text = ""
        self._shown_tokens = self._shown_text = 0

    def update(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        """Take in all that the device knows of this request, prompt included."""
        self.extend(tokens[self.prompt_length + len(self.tokens) :].tolist(), counts[len(self.counts) :].tolist())

    def extend(self, tokens: list[int], counts: list[int]) -> None:
        """Take in new tokens, and the rounds that they come from; nothing more once a stop string was found."""
        if self.transcript.stopped:
            return
        text, kept = self.transcript.push(tokens)
        self.tokens += tokens[:kept]
        self.text += text
        self.counts += counts

    def drafted(self) -> list[bool]:
        """For each token, whether the drafter had it: all of a round but the bonus."""
        flags = [False]
        for count in self.counts:
            flags += [True] * (count - 1) + [False]
        return flags[: len(self.tokens)]

    def piece(self) -> Piece | None:
        """What is new since the last piece."""
        tokens, text = self.tokens[self._shown_tokens :], self.text[self._shown_text :]
        flags = self.drafted()[self._shown_tokens :]
        self._shown_tokens, self._shown_text = len(self.tokens), len(self.text)
        return Piece(text, tokens, flags) if tokens or text else None

    def generation(self) -> Generation:
        self.text += self.transcript.flush()
        lengths, left = [], len(self.tokens) - 1
        for count in self.counts:
            if left > 0:
                lengths.append(min(count, left))
            left -= count
        stopped = self.transcript.stopped or (bool(self.tokens) and self.tokens[-1] in self.ends)
        return Generation(list(self.tokens), self.text, lengths, "stop" if stopped else "length")
