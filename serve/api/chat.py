"""/v1/chat/completions: messages through the target's template, tool calls out of the text."""

import json
import uuid
from typing import Any

from dflash_jax.decoding.output import Generation, Piece
from dflash_jax.text import Tokenizer
from serve.api.drafts import Drafts, whole
from serve.api.probabilities import chat_logprobs, joined
from serve.api.replies import Choice, Reply
from serve.api.schemas import ChatBody, Message
from serve.api.tools import Call, ToolCalls


def render(tokenizer: Tokenizer, body: ChatBody) -> list[int]:
    """Token ids of messages and tools as the target's template writes them. InputError where it refuses."""
    options = dict(body.chat_template_kwargs or {})
    if body.tools and body.tool_choice != "none":
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    text = tokenizer.render([_plain(message) for message in body.messages], **options)
    return tokenizer.encode_rendered(text)[0].tolist()


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates know it: text, and arguments as objects."""
    plain = message.model_dump(exclude_none=True)
    plain["content"] = "".join(part.text for part in message.content or ())
    if message.role == "developer":  # OpenAI's new name for it; templates pass over roles that they do not know
        plain["role"] = "system"
    for call in plain.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return plain


def _arguments(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


class ChatReply(Reply):
    """OpenAI's chat completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, body: ChatBody, tokenizer: Tokenizer):
        super().__init__(model, body.n or 1)
        calls = bool(body.tools) and body.tool_choice != "none"
        schemas = {tool.function.name: tool.function.parameters or {} for tool in body.tools or ()}
        self._tokenizer = tokenizer
        self._parsers = [ToolCalls(schemas) for _ in range(self.choices)] if calls else None
        self._drafts = [Drafts(tokenizer) for _ in range(self.choices)] if body.dflash else None
        self._called = [0] * self.choices

    def _delta(
        self, index: int, delta: dict[str, Any], reason: str | None = None, dflash: dict[str, Any] | None = None
    ) -> Choice:
        more = {} if dflash is None else {"dflash": dflash}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason, **more}

    def begin(self, index: int) -> list[Choice]:
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def piece(self, index: int, piece: Piece) -> list[Choice]:
        text: list[str | Call] = [piece.text]
        choices = self._deltas(index, text if self._parsers is None else self._parsers[index].push(piece.text))
        if (found := chat_logprobs(self._tokenizer, piece)) is not None:
            choices = choices or [self._delta(index, {"content": ""})]
            choices[-1]["logprobs"] = found
        if self._drafts:  # of the text as the model wrote it, tool calls and all
            choices.append(self._delta(index, {}, dflash=self._drafts[index].follow(piece)))
        return choices

    def _deltas(self, index: int, found: list[str | Call]) -> list[Choice]:
        choices = []
        for item in found:
            if isinstance(item, Call):
                number, self._called[index] = self._called[index], self._called[index] + 1
                choices.append(self._delta(index, {"tool_calls": [{"index": number, **_call(item)}]}))
            elif item:
                choices.append(self._delta(index, {"content": item}))
        return choices

    def end(self, index: int, generation: Generation) -> list[Choice]:
        choices = [] if self._parsers is None else self._deltas(index, self._parsers[index].flush())
        dflash = self._drafts[index].rest() if self._drafts else None
        return [*choices, self._delta(index, {}, _reason(generation, self._called[index]), dflash)]

    def whole(self, index: int, pieces: list[Piece], generation: Generation) -> Choice:
        found: list[str | Call] = [generation.text]
        if self._parsers is not None:
            found = [*self._parsers[index].push(generation.text), *self._parsers[index].flush()]
        text = "".join(item for item in found if isinstance(item, str))
        calls = [_call(item) for item in found if isinstance(item, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        more = {"dflash": whole(self._tokenizer, pieces)} if self._drafts else {}
        reason = _reason(generation, len(calls))
        likely = joined([chat_logprobs(self._tokenizer, piece) for piece in pieces])
        return {"index": index, "message": message, "logprobs": likely, "finish_reason": reason, **more}


def _reason(generation: Generation, calls: int) -> str:
    return "tool_calls" if calls and generation.finish_reason == "stop" else generation.finish_reason


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
