"""From bodies to the engine's requests."""

import secrets
from collections.abc import Sequence

from dflash_jax.errors import InputError
from dflash_jax.text import Prompt
from serve.api.errors import ApiError
from serve.api.forced import forced
from serve.api.schemas import Body, ChatBody, CompletionBody
from serve.engine import Engine
from serve.grammar import Grammar
from serve.requests import Request

COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat goes on to the end
SEEDS = 2**32


def engine_requests(body: Body, prompts: Sequence[Prompt], engine: Engine, grammar: Grammar | None) -> list[Request]:
    """`n` for each prompt, in their order. Choice i has the seed + i; without a seed, each prompt has one by chance.

    InputError for prompts that cannot be, and for more than the engine ever takes.
    """
    config, tokenizer = engine.config, engine.pair.tokenizer
    count, longest = len(prompts) * (body.n or 1), config.sizes.length
    if count > config.max_requests:
        raise InputError(
            f"these are {count} requests (prompts times n); this server takes at most {config.max_requests}"
        )
    settings = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "logit_bias": {int(k): v for k, v in body.logit_bias.items()} if body.logit_bias else None,
        "stop": (*(body.stop or ()), *(body.stop_token_ids or ())),
        "max_new_tokens": _most_tokens(body, longest),
        "min_tokens": body.min_tokens or 0,
        "logprobs": _likely_tokens(body),
        "grammar": grammar,
    }
    for name in ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if (value := getattr(body, name)) is not None:
            settings[name] = value
    requests = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)  # once for all choices
        first = secrets.randbelow(SEEDS) if body.seed is None else body.seed
        requests += [Request(ids, seed=(first + i) % SEEDS, **settings) for i in range(body.n or 1)]
    return requests


def _most_tokens(body: Body, longest: int) -> int:
    if isinstance(body, ChatBody):
        given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        return longest if given is None else given
    return COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens


def _likely_tokens(body: Body) -> int | None:
    """How many are to be named beside each token; None: no log-probabilities."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionBody) else None


def refuse_unavailable(body: Body) -> None:
    """ApiError for what OpenAI's servers know and this one does not do: grammars of calls that may come or not."""
    asked = []
    if isinstance(body, ChatBody) and not forced(body):
        if body.tools and body.parallel_tool_calls is False:
            asked.append("parallel_tool_calls: false without a tool_choice that asks for a call")
        if any(tool.function.strict for tool in body.tools or ()):
            asked.append("strict functions without a tool_choice that asks for one")
    if asked:
        raise ApiError(400, f"this server cannot do {', '.join(asked)}; leave it out", code="unsupported")


def echoes(body: CompletionBody) -> bool:
    """Whether prompts are repeated before their completions. InputError where that cannot be."""
    if body.echo and body.max_tokens == 0:
        raise InputError("max_tokens is 0, with echo; this server has to complete at least one token")
    return bool(body.echo)
