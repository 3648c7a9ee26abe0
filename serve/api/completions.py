"""/v1/completions: prompts as they are."""

from typing import Any

from dflash_jax.decoding.output import Generation, Piece
from dflash_jax.text import Tokenizer
from serve.api.drafts import Drafts, whole
from serve.api.probabilities import CompletionLogprobs, joined
from serve.api.replies import Choice, Reply


class CompletionReply(Reply):
    """OpenAI's text completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, choices: int, tokenizer: Tokenizer, echo: list[str], drafts: bool):
        """`echo`: the text before each prompt's completions. `drafts`: tell of them."""
        super().__init__(model, choices)
        self._tokenizer, self._echo = tokenizer, echo
        count = choices * len(echo)
        self._drafts = [Drafts(tokenizer) for _ in range(count)] if drafts else None
        self._logprobs = [CompletionLogprobs(tokenizer, len(echo[i // choices])) for i in range(count)]

    def _choice(
        self, index: int, text: str, reason: str | None, dflash: dict[str, Any] | None, logprobs: Any = None
    ) -> Choice:
        more = {} if dflash is None else {"dflash": dflash}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, **more}

    def begin(self, index: int) -> list[Choice]:
        before = self._echo[index // self.choices]
        return [self._choice(index, before, None, None)] if before else []

    def piece(self, index: int, piece: Piece) -> list[Choice]:
        dflash = self._drafts[index].follow(piece) if self._drafts else None
        found = self._logprobs[index].follow(piece)
        return [self._choice(index, piece.text, None, dflash, found)] if piece.text or dflash or found else []

    def end(self, index: int, generation: Generation) -> list[Choice]:
        dflash = self._drafts[index].rest() if self._drafts else None
        return [self._choice(index, "", generation.finish_reason, dflash)]

    def whole(self, index: int, pieces: list[Piece], generation: Generation) -> Choice:
        dflash = whole(self._tokenizer, pieces) if self._drafts else None
        text = self._echo[index // self.choices] + generation.text
        found = joined([self._logprobs[index].follow(piece) for piece in pieces])
        return self._choice(index, text, generation.finish_reason, dflash, found)
