"""/v1/completions: prompts as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dflash_jax.decoding.output import Generation, Piece
from dflash_jax.text import Tokenizer
from serve.api.drafts import Drafts, whole
from serve.api.probabilities import CompletionLogprobs, joined
from serve.api.replies import Choice, Reply


@dataclass(frozen=True)
class Shown:
    """What is made for each prompt, and what of it is shown."""

    made: int
    choices: int  # the likeliest of these
    drafts: bool
    logprobs: int | None
    echo: bool


class CompletionReply(Reply):
    """OpenAI's text completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, model: str, shown: Shown, tokenizer: Tokenizer, echo: list[str], prompts: Sequence[Sequence[int]]
    ):
        """`echo`: the text before each prompt's completions. `prompts`: the ids of each choice's."""
        super().__init__(model, shown.made, tokenizer)
        self._shown, self._echo, self._prompts = shown, echo, prompts
        count = shown.made * len(echo)
        self._drafts = [Drafts(tokenizer) for _ in range(count)] if shown.drafts else None
        self._logprobs = [CompletionLogprobs(tokenizer) for _ in range(count)]

    def kept(self, generations: Mapping[int, Generation]) -> list[int]:
        made, choices = self._shown.made, self._shown.choices
        if made == choices:
            return super().kept(generations)

        def likely(index: int) -> float:
            found = generations[index].logprobs or ()
            return sum(token.logprob for token in found) / max(len(found), 1)

        prompts = (range(first, first + made) for first in range(0, len(generations), made))
        return [index for prompt in prompts for index in sorted(prompt, key=likely, reverse=True)[:choices]]

    def _choice(
        self, index: int, text: str, reason: str | None, dflash: dict[str, Any] | None, logprobs: Any = None
    ) -> Choice:
        more = {} if dflash is None else {"dflash": dflash}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, **more}

    def _likely(self, index: int, found: Piece | Generation) -> dict[str, Any] | None:
        """Return log-probabilities of a piece, or at the end of what no piece has brought: the prompt's come first."""
        if self._shown.logprobs is None:
            return None
        follower, parts = self._logprobs[index], []
        if self._shown.echo and not follower.begun and found.prompt_logprobs is not None:
            text = self._echo[index // self.choices]
            parts.append(follower.prompt(self._prompts[index], found.prompt_logprobs, self._shown.logprobs, text))
        if isinstance(found, Piece):
            parts.append(follower.follow(found))
        return joined(parts)

    def begin(self, index: int) -> list[Choice]:
        before = self._echo[index // self.choices]
        return [self._choice(index, before, None, None)] if before else []

    def piece(self, index: int, piece: Piece) -> list[Choice]:
        dflash = self._drafts[index].follow(piece) if self._drafts else None
        found = self._likely(index, piece)
        return [self._choice(index, piece.text, None, dflash, found)] if piece.text or dflash or found else []

    def end(self, index: int, generation: Generation) -> list[Choice]:
        dflash = self._drafts[index].rest() if self._drafts else None
        return [self._choice(index, "", generation.finish_reason, dflash, self._likely(index, generation))]

    def whole(self, index: int, pieces: list[Piece], generation: Generation) -> Choice:
        dflash = whole(self.tokenizer, pieces) if self._drafts else None
        text = self._echo[index // self.choices] + generation.text
        found = joined([self._likely(index, part) for part in (*pieces, generation)])
        return self._choice(index, text, generation.finish_reason, dflash, found)
