"""Prompts that the target makes up itself: what it writes where its chat template lets the user speak.

Source: Magpie (arXiv 2406.08464).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dflash_jax.errors import InputError
from dflash_jax.pair import Pair
from dflash_jax.text import Tokenizer
from train.records import JsonLines
from train.regenerate import RegenerateConfig, regenerate

MESSAGE = "A message."


def around_a_message(tokenizer: Tokenizer, template: Mapping[str, Any]) -> tuple[str, str]:
    """What the template writes before a user's first message, and from its end to where the reply begins.

    InputError where there is no template, or nothing on one of its sides.
    """
    text = tokenizer.render([{"role": "user", "content": MESSAGE}], ask=True, **template)
    before, _, after = text.partition(MESSAGE)
    if not before or not after:
        raise InputError(
            f"the chat template writes a message as {text!r}, with nothing to begin or to end it; give data.prompts "
            "instead of own_prompts"
        )
    return before, after


def make_own_prompts(
    pair: Pair, config: RegenerateConfig, template: Mapping[str, Any], folder: Path
) -> list[list[int]] | None:
    """Token ids of the different ones among `config.own_prompts` messages; None if it was stopped.

    Drawn at temperature 1 and kept in `folder`, as `regenerate` does it. Messages that do not end within
    `config.longest` are left out. InputError where none is left, there is no room for any, or no opening.
    """
    if not config.own_openings:
        raise InputError('own_openings is empty; give how messages begin, [""] for nothing')
    before, after = around_a_message(pair.tokenizer, template)
    openings = [_ids(pair.tokenizer, before + begin) for begin in config.own_openings]
    closing = _ids(pair.tokenizer, after)
    room = config.longest - max(map(len, openings)) - len(closing)
    if room < 1:
        raise InputError(
            f"longest is {config.longest}, and the chat template and the opening have {config.longest - room} tokens; "
            "give a larger longest"
        )
    changes = {"sampled": 1.0, "temperature": 1.0, "stop": tuple(closing[:1]), "seed": config.seed + 1}
    begun = [openings[i % len(openings)] for i in range(config.own_prompts)]
    if not regenerate(pair, begun, replace(config, response=room, **changes), folder, "own prompts"):
        return None
    lines = JsonLines((folder,))
    written = map(lines.__getitem__, range(len(lines)))
    ended = (line["tokens"][:-1] for line in written if line["finish_reason"] == "stop")
    found = dict.fromkeys(tuple(tokens) for tokens in ended if tokens not in openings)
    if not found:
        raise InputError(
            f"none of {config.own_prompts} messages that the target began ended within {room} tokens; give "
            "data.prompts, or a larger longest"
        )
    return [[*tokens, *closing] for tokens in found]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_rendered(text)[0].tolist()
