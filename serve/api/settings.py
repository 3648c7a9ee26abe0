"""From bodies to the engine's requests."""

import secrets
from collections.abc import Sequence

from dflash_jax.errors import InputError
from dflash_jax.text import Prompt
from serve.api.schemas import Body, ChatBody, CompletionBody
from serve.engine import Engine
from serve.grammar import Grammar
from serve.requests import Request

COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat goes on to the end
SEEDS = 2**32
NEVER = -1e9  # the bias of a token that must not come


def engine_requests(body: Body, prompts: Sequence[Prompt], engine: Engine, grammar: Grammar | None) -> list[Request]:
    """Return `made` for each prompt, in their order, of which choice i has the seed + i.

    Without a seed, each prompt has one by chance. InputError for prompts that cannot be, and for more of them than the
    engine ever takes.
    """
    config, tokenizer = engine.config, engine.pair.tokenizer
    count, longest = len(prompts) * made(body), config.sizes.length
    if count > config.max_requests:
        raise InputError(
            f"these are {count} requests (prompts times n); this server takes at most {config.max_requests}"
        )
    settings = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "logit_bias": _biases(body, engine) or None,
        "stop": (*(body.stop or ()), *(body.stop_token_ids or ())),
        "max_new_tokens": _most_tokens(body, longest),
        "min_tokens": body.min_tokens or 0,
        "logprobs": _likely_tokens(body),
        "prompt_logprobs": prompt_tokens_named(body),
        "grammar": grammar,
        "ignore_eos": bool(body.ignore_eos),
        "cache_salt": body.cache_salt or "",
        "top_k": 0 if body.top_k in (None, -1) else body.top_k,
    }
    for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if (value := getattr(body, name)) is not None:
            settings[name] = value
    requests = []
    for prompt in prompts:
        most = None if body.truncate_prompt_tokens else longest - 1
        ids = tokenizer.encode(prompt, most)[-(body.truncate_prompt_tokens or 0) :]  # once for all choices
        first = secrets.randbelow(SEEDS) if body.seed is None else body.seed
        requests += [Request(ids, seed=(first + i) % SEEDS, **settings) for i in range(made(body))]
    return requests


def made(body: Body) -> int:
    """Return how many completions are made for each prompt; more than `n` where the best of them are asked for."""
    best_of = body.best_of if isinstance(body, CompletionBody) else None
    return best_of or body.n or 1


def _biases(body: Body, engine: Engine) -> dict[int, float]:
    """Return the biases that are asked for, and those of words that must not come."""
    found = {int(k): v for k, v in (body.logit_bias or {}).items()}
    for word in body.bad_words or ():
        for text in (word, f" {word.lstrip()}"):
            ids = engine.pair.tokenizer.encode_rendered(text)[0].tolist()
            if len(ids) == 1:
                found[ids[0]] = NEVER
            elif text == word:
                raise InputError(f"bad_words has {word[:40]!r}, which is {len(ids)} tokens; give words of one token")
    if body.allowed_token_ids is not None:  # a grammar sees to the others
        found |= {end: NEVER for end in engine.pair.target.config.eos_token_ids if end not in body.allowed_token_ids}
    return found


def _most_tokens(body: Body, longest: int) -> int:
    if isinstance(body, ChatBody):
        given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        return longest if given is None else given
    return COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens


def _likely_tokens(body: Body) -> int | None:
    """How many are to be named beside each token; None: no log-probabilities."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else None
    ranked = 0 if made(body) > (body.n or 1) else None
    return (ranked if body.logprobs is None else body.logprobs) if isinstance(body, CompletionBody) else None


def prompt_tokens_named(body: Body) -> int | None:
    """Return how many likely tokens are to be named beside each of the prompt's; None: no log-probabilities of it."""
    echoed = body.logprobs if isinstance(body, CompletionBody) and body.echo else None
    return max((count for count in (body.prompt_logprobs, echoed) if count is not None), default=None)
