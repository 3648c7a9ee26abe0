"""/v1/chat/completions: messages through the target's template, thoughts and tool calls out of the text."""

import json
import uuid
from dataclasses import dataclass, replace
from typing import Any

from dflash_jax.decoding.output import Generation, Piece
from dflash_jax.text import Tokenizer
from serve.api.drafts import Drafts, whole
from serve.api.forced import call_grammar, forced, free_grammar, names_function
from serve.api.grammars import grammar_of
from serve.api.probabilities import chat_logprobs, joined
from serve.api.reasoning import OPEN, Thoughts
from serve.api.replies import Choice, Reply
from serve.api.schemas import ChatBody, Message, Tool
from serve.api.tools import Call, ToolCalls
from serve.grammar import Grammar


@dataclass(frozen=True)
class Prompt:
    """A chat as the target's template writes it."""

    ids: list[int]
    splits: bool  # whether what the model thinks is told apart from what it says
    opened: bool  # whether it thinks from its first token on
    tags: bool  # whether tool calls are written with tags, and not as JSON


def render(tokenizer: Tokenizer, body: ChatBody, *, most: int, reasoning: bool) -> Prompt:
    """Messages and tools through the template. InputError where it refuses, and for more than `most` tokens.

    `reasoning` off leaves all in the content, whatever the template knows of thoughts.
    """
    options = dict(body.chat_template_kwargs or {})
    for name in ("enable_thinking", "reasoning_effort"):
        if (value := getattr(body, name)) is not None:
            options.setdefault(name, value)
    if tools := may_call(body):
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    text = tokenizer.render([_plain(message) for message in body.messages], **options)
    template = tokenizer.chat_template
    splits = reasoning and OPEN in template
    ids = tokenizer.encode_rendered(text, None if body.truncate_prompt_tokens else most)[0].tolist()
    return Prompt(ids, splits, splits and text.rstrip().endswith(OPEN), "<function=" in template)


def chat_grammar(body: ChatBody, prompt: Prompt) -> Grammar | None:
    """What the answer has to match: the calls that have to come, or what `grammar_of` gives; behind the thoughts."""
    if functions := forced(body):
        several = body.parallel_tool_calls is not False and not names_function(body)
        grammar: Grammar | None = call_grammar(functions, tags=prompt.tags, several=several)
    else:
        grammar = grammar_of(body)
    if grammar is None and any(tool.function.strict for tool in may_call(body)):
        functions = [tool.function for tool in may_call(body)]
        grammar = free_grammar(functions, tags=prompt.tags, several=body.parallel_tool_calls is not False)
    return replace(grammar, thinks=prompt.opened) if grammar is not None else None


def may_call(body: ChatBody) -> list[Tool]:
    """Return the tools that the model may use."""
    return [] if body.tool_choice == "none" else body.tools or []


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
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


class ChatReply(Reply):
    """OpenAI's chat completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, body: ChatBody, tokenizer: Tokenizer, prompt: Prompt):
        super().__init__(model, body.n or 1, tokenizer)
        schemas = {tool.function.name: tool.function.parameters or {} for tool in may_call(body)}
        self._parsers = [ToolCalls(schemas) for _ in range(self.choices)] if schemas else None
        self._one_call = body.parallel_tool_calls is False
        self._drafts = [Drafts(tokenizer) for _ in range(self.choices)] if body.dflash else None
        self._thoughts = [Thoughts(prompt.opened) for _ in range(self.choices)] if prompt.splits else None
        self._called = [0] * self.choices
        self._ends_with = "stop" if names_function(body) else "tool_calls"  # as OpenAI's

    def _delta(
        self, index: int, delta: dict[str, Any], reason: str | None = None, dflash: dict[str, Any] | None = None
    ) -> Choice:
        more = {} if dflash is None else {"dflash": dflash}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason, **more}

    def begin(self, index: int) -> list[Choice]:
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def piece(self, index: int, piece: Piece) -> list[Choice]:
        choices = self._deltas(index, *self._split(index, piece.text))
        if (found := chat_logprobs(self.tokenizer, piece)) is not None:
            choices = choices or [self._delta(index, {"content": ""})]
            choices[-1]["logprobs"] = found
        if self._drafts:  # of the text as the model wrote it, thoughts and tool calls and all
            choices.append(self._delta(index, {}, dflash=self._drafts[index].follow(piece)))
        return choices

    def _split(self, index: int, text: str, end: bool = False) -> tuple[str, list[str | Call]]:
        """What is certain with so much more text, the last one if this is the end: thoughts; text and calls."""
        thought, said = ("", text) if self._thoughts is None else self._thoughts[index].push(text)
        if end and self._thoughts is not None:
            more = self._thoughts[index].flush()
            thought, said = thought + more[0], said + more[1]
        if self._parsers is None:
            return thought, [said]
        found = [*self._parsers[index].push(said), *(self._parsers[index].flush() if end else ())]
        if not self._one_call:
            return thought, found
        if self._called[index]:
            return "", []
        ends = next((i for i, item in enumerate(found, 1) if isinstance(item, Call)), len(found))
        return thought, found[:ends]  # nothing comes behind the first call

    def _deltas(self, index: int, thought: str, found: list[str | Call]) -> list[Choice]:
        choices = [self._delta(index, {"reasoning_content": thought})] if thought else []
        for item in found:
            if isinstance(item, Call):
                number, self._called[index] = self._called[index], self._called[index] + 1
                choices.append(self._delta(index, {"tool_calls": [{"index": number, **_call(item)}]}))
            elif item:
                choices.append(self._delta(index, {"content": item}))
        return choices

    def end(self, index: int, generation: Generation) -> list[Choice]:
        choices = self._deltas(index, *self._split(index, "", end=True))
        dflash = self._drafts[index].rest() if self._drafts else None
        return [*choices, self._delta(index, {}, self._reason(generation, self._called[index]), dflash)]

    def whole(self, index: int, pieces: list[Piece], generation: Generation) -> Choice:
        thought, found = self._split(index, generation.text, end=True)
        text = "".join(item for item in found if isinstance(item, str))
        calls = [_call(item) for item in found if isinstance(item, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        more = {"dflash": whole(self.tokenizer, pieces)} if self._drafts else {}
        reason = self._reason(generation, len(calls))
        likely = joined([chat_logprobs(self.tokenizer, piece) for piece in pieces])
        return {"index": index, "message": message, "logprobs": likely, "finish_reason": reason, **more}

    def _reason(self, generation: Generation, calls: int) -> str:
        return self._ends_with if calls and generation.finish_reason == "stop" else generation.finish_reason


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
