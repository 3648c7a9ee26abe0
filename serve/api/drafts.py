"""The `dflash` extension: which part of a text was drafted, and how many tokens each round gave."""

from typing import Any

from dflash_jax.decoding.output import Piece
from dflash_jax.spans import Spans
from dflash_jax.text import Tokenizer


class Drafts:
    """Follows the pieces of one generation."""

    def __init__(self, tokenizer: Tokenizer):
        self._spans = Spans(tokenizer)
        self._first = True  # the first token comes from the prefill and not from a round
        self._length = 0  # of the round so far

    def follow(self, piece: Piece) -> dict[str, Any]:
        """What a piece adds.

        `spans`: runs of {`text`, `drafted`} that make up its text, one for each token that shows. `tokens` and
        `drafted_tokens`: how many are new, those without text included. `acceptance_lengths`: of the rounds that ended;
        a round ends with a token that was not drafted, or with the generation, see `rest`.
        """
        lengths = []
        for drafted in piece.drafted:
            if self._first:
                self._first = False
                continue
            self._length += 1
            if not drafted:
                lengths.append(self._length)
                self._length = 0
        spans = [{"text": text, "drafted": drafted} for text, drafted in self._spans.split(piece) if text]
        return _told(spans, len(piece.tokens), sum(piece.drafted), lengths)

    def rest(self) -> dict[str, Any]:
        """What the end adds: the round that it cut, if it did."""
        return _told([], 0, 0, [self._length] if self._length else [])


def _told(spans: list[dict[str, Any]], tokens: int, drafted: int, lengths: list[int]) -> dict[str, Any]:
    return {"spans": spans, "tokens": tokens, "drafted_tokens": drafted, "acceptance_lengths": lengths}


def whole(tokenizer: Tokenizer, pieces: list[Piece]) -> dict[str, Any]:
    """The same for a generation that is not streamed."""
    drafts = Drafts(tokenizer)
    parts = [*(drafts.follow(piece) for piece in pieces), drafts.rest()]
    lists = {name: [x for part in parts for x in part[name]] for name in ("spans", "acceptance_lengths")}
    return lists | {name: sum(part[name] for part in parts) for name in ("tokens", "drafted_tokens")}
