"""Conversations as token ids, and which of them the target itself writes.

Templates rarely mark the parts of the assistant, so these are found by rendering prefixes: what the template adds when
a reply comes in, after what it writes to ask for one, is the reply.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dflash_jax.errors import InputError
from dflash_jax.text import Tokenizer

Messages = Sequence[Mapping[str, Any]]


def reply_spans(tokenizer: Tokenizer, messages: Messages, options: Mapping[str, Any]) -> tuple[str, list[tuple]]:
    """The rendered conversation, and (start, end) of the replies in it, in characters.

    Some templates write a reply differently once another turn follows (they drop its thoughts). Such a reply is none:
    the target never writes it in that form.
    """
    whole = tokenizer.render(messages, ask=False, **options)
    spans = []
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        asked = tokenizer.render(messages[:i], ask=True, **options)
        replied = tokenizer.render(messages[: i + 1], ask=False, **options)
        if replied.startswith(asked) and whole.startswith(replied):
            spans.append((len(asked), len(replied)))
    return whole, spans


def conversation(
    tokenizer: Tokenizer, messages: Messages, ends: Sequence[int], options: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [T], mask bool [T]): the mask is on the replies, each up to its end token.

    `ends` are the target's end tokens: what the template writes behind one is not the target's. InputError for messages
    that the template refuses.
    """
    text, spans = reply_spans(tokenizer, messages, options)
    tokens, offsets = tokenizer.encode_rendered(text)
    inside = np.zeros(len(text) + 1, bool)
    for start, end in spans:
        inside[start:end] = True
    first, last = offsets[:, 0], offsets[:, 1] - 1
    mask = inside[first] & inside[np.maximum(last, first)] & (last >= first)
    for start, end in spans:
        here = np.flatnonzero((first >= start) & (last < end))
        stops = np.flatnonzero(np.isin(tokens[here], list(ends)))
        if len(stops):
            mask[here[stops[0] + 1 :]] = False
    return tokens, mask


def prompt_ids(tokenizer: Tokenizer, line: Any, options: Mapping[str, Any]) -> list[int]:
    """Token ids of one prompt: a text, chat messages, or an object with such a `prompt`, `messages` or `text`.

    A reply at the end of the messages is left out: the target writes its own. InputError for anything else.
    """
    if isinstance(line, dict):
        line = next((line[name] for name in ("messages", "prompt", "text") if name in line), None)
    if isinstance(line, list) and line and all(isinstance(message, dict) for message in line):
        while line and line[-1].get("role") == "assistant":
            line = line[:-1]
        if line:
            return tokenizer.encode_rendered(tokenizer.render(line, ask=True, **options))[0].tolist()
    if isinstance(line, str) or (isinstance(line, list) and line and all(isinstance(token, int) for token in line)):
        return tokenizer.encode(line)
    raise InputError(
        f"a prompt is {str(line)[:80]!r}; give a text, chat messages that do not all come from the assistant, "
        "or an object with one of these as `prompt`, `messages` or `text`"
    )
