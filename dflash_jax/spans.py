"""Which part of a text came from which token."""

from collections.abc import Iterator

from dflash_jax.decoding.output import Piece
from dflash_jax.text import TextStream, Tokenizer


class Spans:
    """Cuts the text of pieces into runs by the tokens they came from.

    A piece's text may lag behind its tokens (half a character, the possible start of a stop string), so what the tokens
    said is kept until the pieces' text has caught up.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = TextStream(tokenizer)
        self._ahead: list[tuple[int, bool]] = []  # (characters, drafted) not shown yet

    def split(self, piece: Piece) -> Iterator[tuple[str, bool]]:
        """(text, drafted) runs that make up the piece's text."""
        for token, drafted in zip(piece.tokens, piece.drafted, strict=True):
            self._ahead.append((len(self._stream.push(token)), drafted))
        text = piece.text
        while text and self._ahead:
            size, drafted = self._ahead.pop(0)
            if size > len(text):
                self._ahead.insert(0, (size - len(text), drafted))
            yield text[:size], drafted
            text = text[size:]
        if text:  # the unfinished character at the end of a generation
            yield text, False
