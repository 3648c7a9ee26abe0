"""Text in and out: prompts to token ids, token ids to text as they arrive, stop strings.

`tokenizers` reads a tokenizer.json in milliseconds. transformers, which takes seconds to import, is used only where
it is needed: for a folder without tokenizer.json, and for chat templates.
"""

import functools
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, decoders, models
from tokenizers import Tokenizer as Core

from dflash_jax.errors import InputError, TooLongError

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
SLACK = 4  # a tokenizer may write characters together before it looks for tokens
REPLACEMENT = "\ufffd"  # what decoders give for bytes that are no character, or not yet one


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> "Tokenizer":
    """The tokenizer of a checkpoint folder; one that only takes token ids where the folder has none.

    `vocab_size` is the model's: ids at or above it are refused. InputError for files that cannot be read.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return Tokenizer(Core.from_file(str(file)), folder, vocab_size)
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{file} is not a tokenizer: {error}; copy it again from the model's release") from error
    if any(
        (folder / name).is_file() for name in ("vocab.json", "vocab.txt", "tokenizer.model", "tokenizer_config.json")
    ):
        core = getattr(_transformers_tokenizer(folder), "backend_tokenizer", None)
        if core is None:
            raise InputError(
                f"{folder} has only a slow tokenizer; save it once with transformers so that it has a tokenizer.json"
            )
        return Tokenizer(core, folder, vocab_size)
    return Tokenizer(None, folder, vocab_size)


def _transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # seconds to import

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"transformers cannot read the tokenizer in {folder}: {reason}; a tokenizer.json would do"
        ) from error


class Tokenizer:
    """Prompts to ids and ids to text.

    `core` is None for a checkpoint without a tokenizer: it takes ids, and its text is empty.
    """

    def __init__(self, core: Core | None, folder: Path, vocab_size: int | None = None) -> None:
        self.core = core
        self.folder = folder
        self.vocab_size = vocab_size if vocab_size is not None else core.get_vocab_size() if core else None

    def encode(self, prompt: Prompt, most: int | None = None) -> list[int]:
        """Token ids of a text (with the special tokens the tokenizer adds), of ids (checked), or of chat messages.

        InputError for an empty prompt, ids outside the vocabulary, chat messages that the template does not take, and
        more than `most` tokens: a text that must have more is not looked at.
        """
        if isinstance(prompt, str):
            tokens = self._encode_text(prompt, add_special_tokens=True, most=most).ids if prompt else []
        else:
            messages = [item for item in prompt if isinstance(item, dict)]
            if messages and len(messages) == len(prompt):
                # The template writes the special tokens itself.
                tokens = self._encode_text(self.render(messages), add_special_tokens=False, most=most).ids
            else:
                _check_length(len(prompt), most)
                tokens = [_as_id(item) for item in prompt]
        if not tokens:
            raise InputError("the prompt is empty; give at least one token of text, ids or chat messages")
        self._check_range(tokens)
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of token ids, special tokens left out; the same text as a `TextStream` gives piece by piece."""
        stream = TextStream(self)
        return stream.push(*tokens) + stream.flush()

    def _encode_text(self, text: str, *, add_special_tokens: bool, most: int | None) -> Encoding:
        if self.core is None:
            raise InputError(
                f"{self.folder} has no tokenizer.json; give the prompt as token ids, or copy the tokenizer there"
            )
        if most is not None and len(text) > most * self._longest_token:
            raise TooLongError(f"{len(text)} characters, which are more than {most}", most)
        try:
            encoding = self.core.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:  # it does not say why
            half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if half is None:
                raise
            raise InputError(f"the text holds half a character, {half!r}; give whole ones") from None
        _check_length(len(encoding), most)
        return encoding

    @functools.cached_property
    def _longest_token(self) -> float:
        """Characters of a text that one token can stand for at most; infinite where unknown words have a token."""
        assert self.core is not None
        model = self.core.model
        knows_bytes = isinstance(self.core.decoder, decoders.ByteLevel) or getattr(model, "byte_fallback", False)
        if not isinstance(model, models.BPE) or not (knows_bytes or model.unk_token is None):
            return math.inf
        return SLACK * max(map(len, self.core.get_vocab()))

    def _check_range(self, tokens: list[int]) -> None:
        limit = self.vocab_size
        bad = next((t for t in tokens if t < 0 or (limit is not None and t >= limit)), None)
        if bad is not None:
            raise InputError(
                f"token id {bad} is outside the model's vocabulary; ids are 0 to {limit - 1 if limit else '...'}"
            )

    @functools.cached_property
    def _templates(self) -> Any:
        return _transformers_tokenizer(self.folder)

    @property
    def can_chat(self) -> bool:
        """Whether the folder has a chat template."""
        return _has_chat_template(self.folder)

    @property
    def chat_template(self) -> str:
        """The text of the chat template; empty where there is none."""
        found = self._templates.chat_template if self.can_chat else ""
        return found if isinstance(found, str) else json.dumps(found)  # several, by their names

    def render(self, messages: Sequence[Mapping[str, Any]], *, ask: bool = True, **options: Any) -> str:
        """Chat messages as the template writes them, with `ask` up to where the model's reply begins.

        `options` are the template's own, as `enable_thinking`. InputError where there is no template, or it refuses.
        """
        for message in messages:
            if not {"role", "content"} <= message.keys():
                raise InputError(f"a chat message needs `role` and `content`; this one has {sorted(map(str, message))}")
        if not self.can_chat:
            raise InputError(
                f"{self.folder} has no chat template, so chat messages cannot be used; give the prompt as text"
            )
        try:
            return self._templates.apply_chat_template(
                list(messages), add_generation_prompt=ask, tokenize=False, **options
            )
        except InputError:
            raise
        except Exception as error:  # templates raise their own errors, for a role they do not know for instance
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"the chat template of {self.folder} refuses these messages: {reason}") from error

    @property
    def mask_token_id(self) -> int | None:
        """The id of the tokenizer's mask token, if it says which that is."""
        config = self.folder / "tokenizer_config.json"
        if self.core is None or not config.is_file():
            return None
        token = json.loads(config.read_text(encoding="utf-8")).get("mask_token")
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else self.core.token_to_id(token)

    def encode_rendered(self, text: str, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [T] of a text that has its special tokens already, and where each lies in it, [T, 2] characters.

        InputError as from `encode`.
        """
        encoded = self._encode_text(text, add_special_tokens=False, most=most)
        self._check_range(encoded.ids)
        return np.asarray(encoded.ids, np.int32), np.asarray(encoded.offsets, np.int32).reshape(-1, 2)


def _check_length(tokens: int, most: int | None) -> None:
    if most is not None and tokens > most:
        raise TooLongError(str(tokens), most)


def _as_id(item: object) -> int:
    try:
        if isinstance(item, bool):
            raise TypeError
        return operator.index(item)  # numpy integers too  # pyrefly: ignore[bad-argument-type]
    except TypeError:
        kind = type(item).__name__
        raise InputError(f"a prompt is text, token ids or chat messages; this one holds a {kind}") from None


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return False
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))
    except ValueError as error:
        raise InputError(f"{config} is not JSON: {error}; copy it again from the model's release") from error


class TextStream:
    """Token ids in, complete characters out.

    The bytes of one character may lie in several tokens. Text is held back while its last characters may still change,
    at most three: a character has up to four bytes, and each of the first three may show as a replacement character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        core = tokenizer.core
        self._decode: Callable[[list[int]], str] = (
            (lambda ids: "") if core is None else core.decode
        )  # skips special tokens
        self._ids: list[int] = []  # the last tokens shown, for decoders that look back, and those not shown yet
        self._shown_ids = 0
        self._shown = 0  # characters of the text of `_ids` given out already

    def push(self, *tokens: int) -> str:
        """The text that is certain now and was not before; often that of the tokens, "" inside a character."""
        self._ids += tokens
        text = self._decode(self._ids)
        kept = len(text) - len(text.rstrip(REPLACEMENT))
        end = len(text) - min(kept, 3)
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        if kept == 0 and new:
            self._forget()
        return new

    def flush(self) -> str:
        """What is held back, for the end of the text."""
        text = self._decode(self._ids)
        new, self._shown = text[self._shown :], len(text)
        return new

    def _forget(self) -> None:
        """Drop all but the tokens just shown, so that the cost of a token does not grow with the text."""
        self._ids = self._ids[self._shown_ids :]
        self._shown_ids = len(self._ids)
        self._shown = len(self._decode(self._ids))


class StopFinder:
    """Finds the first of several strings in a text that arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # the end of the text, as far as it may be the start of a stop string
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown: nothing of a stop string, and nothing after one."""
        self._held += text
        places = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            end, self.found = min(places)
            return self._held[:end]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What is held back, for a text that ended before a stop string was complete."""
        held, self._held = self._held, ""
        return "" if self.found else held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Transcript:
    """The text of one generation as its tokens arrive: complete characters, cut at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] | str = (), min_tokens: int = 0) -> None:
        """In the text of the first `min_tokens` tokens no stop string is looked for."""
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise InputError(f"stop strings are texts of at least one character, not {list(stops)!r}")
        if stops and tokenizer.core is None:
            raise InputError(f"stop strings need a tokenizer, and {tokenizer.folder} has none; stop by length instead")
        self._stream = TextStream(tokenizer)
        self._stops = StopFinder(stops)
        self._has_stops = bool(stops)
        self._free = min_tokens

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing more may be pushed then."""
        return self._stops.found is not None

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """(text that can be shown now, how many of the tokens are output: all, or up to the end of a stop string)."""
        if not self._has_stops:  # one look for all, which is quicker
            return self._stops.push(self._stream.push(*tokens)), len(tokens)
        shown = []
        for i, token in enumerate(tokens):
            text, self._free = self._stream.push(token), self._free - 1
            shown.append(text if self._free >= 0 else self._stops.push(text))
            if self.stopped:
                return "".join(shown), i + 1
        return "".join(shown), len(tokens)

    def flush(self) -> str:
        """What is held back, for the end of the generation."""
        if self.stopped:
            return ""
        return self._stops.push(self._stream.flush()) + self._stops.flush()
