"""Log-probabilities as OpenAI's two kinds of completion show them."""

from collections.abc import Sequence
from typing import Any

from dflash_jax.decoding.output import Piece, TokenLogprobs
from dflash_jax.text import REPLACEMENT, TextStream, Tokenizer

LEAST = -9999.0  # in place of -infinity, which JSON does not have


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token by itself; special ones by their name, and a part of a character as a replacement character."""
    return "" if tokenizer.core is None else tokenizer.core.decode([token], skip_special_tokens=False)


def chat_logprobs(tokenizer: Tokenizer, piece: Piece) -> dict[str, Any] | None:
    """Of a chat's tokens; None where they were not asked for."""
    if piece.logprobs is None:
        return None
    entries = []
    for token, found in zip(piece.tokens, piece.logprobs, strict=True):
        top = [_entry(tokenizer, other, value) for other, value in found.top]
        entries.append(_entry(tokenizer, token, found.logprob) | {"top_logprobs": top})
    return {"content": entries, "refusal": None}


def _entry(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    known = REPLACEMENT not in text  # the bytes of a part of a character are not in its text
    return {"token": text, "logprob": max(value, LEAST), "bytes": list(text.encode()) if known else None}


class CompletionLogprobs:
    """Follows the pieces of one completion, whose tokens' places in the text are told too."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._stream, self._offset = tokenizer, TextStream(tokenizer), 0
        self.begun = False

    def prompt(self, ids: Sequence[int], found: Sequence[TokenLogprobs], count: int, text: str) -> dict[str, Any]:
        """Return what an echoed prompt adds: none for its first token, and each other's own among the likely ones."""
        tops = [
            TokenLogprobs(one.logprob, ((token, one.logprob), *one.top[:count]))
            for token, one in zip(ids[1:], found, strict=True)
        ]
        entries = self._entries(ids, [None, *tops])
        self._offset, self._stream = len(text), TextStream(self._tokenizer)
        return entries

    def follow(self, piece: Piece) -> dict[str, Any] | None:
        """What a piece adds; None where it was not asked for."""
        return None if piece.logprobs is None else self._entries(piece.tokens, piece.logprobs)

    def _entries(self, tokens: Sequence[int], found: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        offsets, self.begun = [], True
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._stream.push(token))
        return {
            "tokens": [token_text(self._tokenizer, token) for token in tokens],
            "token_logprobs": [None if one is None else max(one.logprob, LEAST) for one in found],
            "top_logprobs": [None if one is None else self._top(one) for one in found],
            "text_offset": offsets,
        }

    def _top(self, found: TokenLogprobs) -> dict[str, float]:
        """By text; of tokens that look alike, the likeliest."""
        pairs = sorted(found.top, key=lambda pair: pair[1])
        return {token_text(self._tokenizer, token): max(value, LEAST) for token, value in pairs}


def prompt_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[TokenLogprobs], count: int
) -> list[dict[str, Any] | None]:
    """Return those of a prompt as vLLM has them: by token id, each token's own first; null for the first token."""

    def entry(token: int, value: float, rank: int | None) -> tuple[str, dict[str, Any]]:
        text = token_text(tokenizer, token)
        return str(token), {"logprob": max(value, LEAST), "rank": rank, "decoded_token": text}

    def named(token: int, one: TokenLogprobs) -> dict[str, Any]:
        likely = [entry(other, value, rank) for rank, (other, value) in enumerate(one.top[:count], 1)]
        return dict([entry(token, one.logprob, None), *likely])

    return [None, *(named(token, one) for token, one in zip(ids[1:], found, strict=True))]


def joined(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Those of several pieces as one."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return {
        name: None if value is None else [x for part in known for x in part[name]] for name, value in known[0].items()
    }
