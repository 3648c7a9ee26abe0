"""From a request as it was sent to one that the engine can run."""

import numpy as np

from dflash_jax.decoding.checks import check_min_tokens, split_stops
from dflash_jax.decoding.logprobs import MOST_LOGPROBS, check_logprobs
from dflash_jax.decoding.output import Output
from dflash_jax.decoding.sampling import Sampling
from dflash_jax.decoding.width import WidthController
from dflash_jax.errors import InputError
from dflash_jax.pair import Pair
from serve.config import Resolved
from serve.device import STOPS
from serve.grammar import Grammars
from serve.requests import Handle, Running


def prepare(
    pair: Pair, handle: Handle, order: int, config: Resolved, grammars: Grammars, controller: WidthController
) -> Running:
    """Check a request.

    InputError as from `dflash_jax.generate`, and for a prompt or settings that this engine is not made for.
    """
    request, vocab, longest = handle.request, pair.target.config.vocab_size, config.sizes.length
    new = request.max_new_tokens
    if isinstance(new, bool) or not isinstance(new, (int, np.integer)) or new < 0:
        raise InputError(f"max_new_tokens is {new!r}; give a whole number of at least 0")
    prompt = pair.tokenizer.encode(request.prompt, most=longest - 1)
    stop_texts, stop_ids = split_stops(request.stop, vocab)
    ends = sorted({*(() if request.ignore_eos else pair.target.config.eos_token_ids), *stop_ids})
    if len(ends) > STOPS:
        raise InputError(f"there are {len(ends)} stop ids, the model's own included; give at most {STOPS}")
    sampling = Sampling.pack(1, vocab, logprobs=request.logprobs, **request.settings)
    least = int(sampling.min_tokens[0])
    check_min_tokens(least, int(new), len(ends), vocab)
    scored = check_logprobs(request.prompt_logprobs, MOST_LOGPROBS, "prompt_logprobs")
    config.check({"logprobs": request.logprobs, "prompt_logprobs": scored}, sampling.plan)
    if request.grammar is not None and least:
        raise InputError("min_tokens and a grammar cannot both say when the output ends; leave one out")
    if request.grammar is not None and not config.sizes.grammar:
        raise InputError("this engine was started without grammars; leave the grammar out")
    matcher = None if request.grammar is None else grammars.matcher(request.grammar)
    stops = np.full(STOPS, -1, np.int32)
    stops[: len(ends)] = ends
    output = Output(
        pair.tokenizer, len(prompt), stop_texts, set(ends), min_tokens=least, logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )  # fmt: skip
    limit, text = min(len(prompt) + int(new), longest), controller.text(grammar=matcher is not None)
    return Running(handle, order, prompt, limit, stops, sampling, output, text, request.cache_salt, matcher)
