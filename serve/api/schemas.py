"""The bodies that are understood. What would change the answer and is not understood is refused by name."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

# Accepted and without effect here: they say who asks, or how the asker keeps books.
HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "request_id", "priority",
    "prediction",  # a hint at the answer, for speed only
    "verbosity",  # a hint at its length
    "spaces_between_special_tokens",  # concerns tokenizers without a tokenizer.json
}  # fmt: skip
# Fields of other engines, each with the only value that is done here.
NEUTRAL: dict[str, Any] = {
    "skip_special_tokens": True, "include_stop_str_in_output": False, "use_beam_search": False, "length_penalty": 1,
    "early_stopping": False,
}  # fmt: skip
MOST_STOPS, LONGEST_STOP = 16, 256  # each token of the output is searched for all of them
MOST_CHOICES = 128
MOST_BIASES = 1024  # each is looked at in Python, while others wait


def _whole(value: Any) -> Any:
    """Return 2 for 2.0, which JSON does not tell apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class Part(BaseModel):
    """Strict: a number as text is a mistake. null is the same as left out, as with OpenAI."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Part):
    """What a stream tells beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool | None = None  # usage so far in every chunk
    include_obfuscation: bool | None = None  # padding against eavesdroppers; there is none here


class Body(Part):
    """What both kinds of completion take: OpenAI's fields, and those of other engines where OpenAI has none."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    neutral: ClassVar[dict[str, Any]] = NEUTRAL

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Whole | None = Field(None, ge=1, le=MOST_CHOICES)
    max_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None  # -1 and 0 switch it off
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=MOST_BIASES)
    seed: Whole | None = None
    stop: list[str] | None = Field(None, max_length=MOST_STOPS)
    stop_token_ids: list[Whole] | None = Field(None, max_length=MOST_BIASES)
    ignore_eos: bool | None = None  # go on behind the model's own end tokens
    bad_words: list[str] | None = Field(None, max_length=MOST_BIASES)  # of one token each
    allowed_token_ids: list[Whole] | None = Field(None, min_length=1, max_length=MOST_BIASES)  # and no others
    truncate_prompt_tokens: Whole | None = Field(None, ge=1)  # so many of the prompt's last ones
    cache_salt: str | None = Field(None, max_length=256)  # only prompts with the same one share a prefix
    return_token_ids: bool | None = None
    prompt_logprobs: Whole | None = None  # how many likely tokens to name beside each of the prompt's
    dflash: bool | None = None  # ours: which tokens were drafted, and how many were accepted in each round
    min_tokens: Whole | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None  # {"json" | "regex" | "grammar" (Lark) | "choice": ...}
    regex: str | None = None  # as structured_outputs.regex
    ebnf: str | None = None  # a grammar in GBNF

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _short_stops(cls, value: list[str] | None) -> list[str] | None:
        if any(not 1 <= len(stop) <= LONGEST_STOP for stop in value or ()):
            raise ValueError(f"stop strings have 1 to {LONGEST_STOP} characters")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _ids_are_numbers(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"keys are token ids, as in {{'17': -100}}; one is {key[:40]!r}")
        return value

    @model_validator(mode="after")
    def _nothing_unknown(self) -> Self:
        given = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        unknown = given.keys() - HARMLESS - self.neutral.keys()
        for name in given.keys() & self.neutral.keys():
            if given[name] != self.neutral[name]:
                only = json.dumps(self.neutral[name])
                raise ValueError(
                    f"{name} is {str(given[name])[:40]!r}, and this server knows only {only}; leave it out"
                )
        if unknown:
            names = ", ".join(sorted(name[:40] for name in unknown)[:5])
            raise ValueError(f"this server does not know {names}; leave it out, or look for its name in the README")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs are not told in a stream; leave stream out, or echo with logprobs")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options were given without stream: true; leave one out or give both")
        return self


class CompletionBody(Body):
    """/v1/completions. `prompt` is a text, token ids, or a list of either."""

    neutral: ClassVar[dict[str, Any]] = NEUTRAL | {"add_special_tokens": True, "suffix": ""}

    prompt: Any
    logprobs: Whole | None = None  # how many likely tokens to name beside each
    echo: bool | None = None
    best_of: Whole | None = Field(None, ge=1, le=MOST_CHOICES)  # made for each prompt, of which the n likeliest stay

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more, each checked for its type."""
        return [self.prompt] if _is_prompt(self.prompt) else self.prompt

    @field_validator("prompt")
    @classmethod
    def _texts_or_ids(cls, value: Any) -> Any:
        if _is_prompt(value) or (isinstance(value, list) and value and all(map(_is_prompt, value))):
            return value
        raise ValueError("give a text, a list of token ids, or a list of such prompts that is not empty")

    @model_validator(mode="after")
    def _enough_to_choose_from(self) -> Self:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}, and n {self.n}; give at least n")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError("best_of is more than n, which a stream cannot choose from; leave stream or best_of out")
        return self


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class Text(Part):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Function(Part):
    """A function that was called; the arguments are JSON in a text."""

    name: str
    arguments: str


class Call(Part):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Part):
    """One message of a chat."""

    role: str
    content: list[Text] | None = None  # a text is the same as one part
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _one_text_is_a_part(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Signature(Part):
    """A function that can be called; its parameters are a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    """Something the model may use."""

    type: Literal["function"]
    function: Signature


class ChatBody(Body):
    """/v1/chat/completions."""

    neutral: ClassVar[dict[str, Any]] = NEUTRAL | {
        "add_special_tokens": False, "add_generation_prompt": True, "continue_final_message": False, "echo": False,
        "include_reasoning": True, "separate_reasoning": True, "stream_reasoning": True, "best_of": 1, "functions": [],
        "function_call": "none",
    }  # fmt: skip

    messages: list[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    max_completion_tokens: Whole | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # as enable_thinking, for the template
    enable_thinking: bool | None = None  # for the template, too
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def _likely_tokens_with_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs was given without logprobs: true; leave it out or give both")
        return self

    @model_validator(mode="after")
    def _allowed_tools_only(self) -> Self:
        """Take `tool_choice: allowed_tools` as those tools, and its mode as the choice."""
        choice = self.tool_choice
        if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
            return self
        allowed = choice.get("allowed_tools", choice)
        try:
            names = {tool.get("function", tool)["name"] for tool in allowed["tools"]}
            kept = [tool for tool in self.tools or () if tool.function.name in names]
        except (KeyError, TypeError, AttributeError):
            raise ValueError("tool_choice.allowed_tools is not understood; give its mode and its tools") from None
        if allowed.get("mode", "auto") not in ("auto", "required") or len(kept) < len(names) or not kept:
            raise ValueError("tool_choice.allowed_tools needs the mode auto or required, and tools that are given")
        self.tools, self.tool_choice = kept, allowed.get("mode", "auto")
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _options_of_the_template_only(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        ours = {"tools", "messages", "conversation", "chat_template", "tokenize", "ask", "add_generation_prompt"}
        if taken := ours & (value or {}).keys():
            raise ValueError(f"{', '.join(sorted(taken))} cannot be given here; these are set by the server")
        return value
