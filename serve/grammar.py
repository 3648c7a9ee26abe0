"""Structured output: which tokens may come next by a JSON schema, a regular expression or a Lark grammar.

llguidance does the parsing. It is imported when the first grammar is used.
"""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt32

from dflash_jax.decoding.masks import words_of
from dflash_jax.errors import InputError
from dflash_jax.pair import Pair

if TYPE_CHECKING:
    from llguidance import LLTokenizer

KINDS = ("json_schema", "regex", "lark")
# Enough to indent; small models that may write any amount of white space write nothing else for ever.
JSON_STYLE = {"whitespace_pattern": r"[ ]|\n[ \t]{0,16}"}

MOST_TEXT = 2**18  # characters of a grammar
STACK, THREADS = 2**29, 2  # bytes, of which only those that are used take memory; a grammar of the largest text fits

THOUGHT = 'start: thought /\\s*/ @answer\nthought[suffix="</think>"]: /(?s:.*)/'


@dataclass(frozen=True)
class Grammar:
    """What an output has to match as a whole.

    kind: "json_schema", "regex" or "lark" (llguidance's dialects of the last two).
    text: the schema as JSON, the expression, or the grammar with its rule `start`.
    thinks: whether any text that ends with </think> comes before that.
    """

    kind: str
    text: str
    thinks: bool = False


def everything_allowed(vocab: int, *shape: int) -> UInt32[np.ndarray, "*shape N"]:
    """Masks that leave nothing out."""
    return np.full((*shape, words_of(vocab)), 0xFFFFFFFF, np.uint32)


class Matcher:
    """Where one output stands in its grammar."""

    def __init__(self, matcher: Any, tokenizer: "LLTokenizer", executor: Any, vocab: int):
        self._matcher, self._executor = matcher, executor
        self._ids, self._words = tokenizer.vocab_size, words_of(vocab)
        self.complete = False  # nothing can follow but an end
        self.error: str | None = None

    def masks(self, drafts: Sequence[int], width: int) -> UInt32[np.ndarray, "{width} N"]:
        """What may follow the output, and the output with the first 1, 2, ... drafts.

        Rows behind a draft that breaks the grammar leave nothing out: that draft is refused, so they do not count.
        """
        from llguidance import numpy as masks

        words = everything_allowed(self._ids, width)
        if drafts:
            block = [(self._matcher, 0, list(drafts))]
            masks.fill_next_token_bitmask_par_with_draft_tokens(self._executor, block, words.view(np.int32))
        else:
            masks.fill_next_token_bitmask(self._matcher, words.view(np.int32))
        return words[:, : self._words]

    def take(self, tokens: Sequence[int]) -> int:
        """Go on with emitted tokens; how many of them are output: all, or up to where the grammar is complete."""
        for i, token in enumerate(tokens):
            if not self._matcher.consume_token(token):
                self.error = _line(self._matcher.get_error())
                return i
            if self._matcher.is_stopped():
                self.complete = True
                return i + 1
        return len(tokens)


class Grammars:
    """Makes matchers for the tokenizer of one pair. Safe to use from several threads."""

    def __init__(self, pair: Pair):
        self._pair, self._lock = pair, threading.Lock()
        self._made: tuple[Any, Any, ThreadPoolExecutor] | None = None

    def matcher(self, grammar: Grammar) -> Matcher:
        """InputError for a grammar that cannot be read, or where there is no llguidance or no tokenizer for it."""
        tokenizer, executor, threads = self._bridge()
        made = threads.submit(_made, grammar, tokenizer).result()
        return Matcher(made, tokenizer, executor, self._pair.target.config.vocab_size)

    def _bridge(self) -> tuple[Any, Any, ThreadPoolExecutor]:
        """The tokenizer as llguidance has it, its threads for masks, and threads to read grammars in."""
        llguidance, pair = _library(), self._pair
        with self._lock:
            if self._made is None:
                if pair.tokenizer.core is None:
                    raise InputError(f"a grammar needs a tokenizer, and {pair.tokenizer.folder} has none; leave it out")
                vocab, ends = pair.target.config.vocab_size, list(pair.target.config.eos_token_ids)
                # A model without end tokens gets one that it cannot say: else llguidance takes some other for it.
                sizes = {"n_vocab": vocab if ends else vocab + 1, "eos_token": ends or vocab}
                try:
                    tokenizer = llguidance.LLTokenizer(pair.tokenizer.core.to_str(), **sizes)
                except Exception as error:  # it has none of its own
                    reason = _line(str(error))
                    raise InputError(
                        f"llguidance does not take this tokenizer: {reason}; leave the grammar out"
                    ) from error
                self._made = tokenizer, llguidance.LLExecutor(), _deep_threads()
            return self._made


def _deep_threads() -> ThreadPoolExecutor:
    """Return threads for grammars whose rules name each other in a long chain: llguidance goes down it by recursion."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="dflash-grammar")
    usual, started = threading.stack_size(STACK), threading.Barrier(THREADS + 1)
    try:
        for _ in range(THREADS):
            pool.submit(started.wait)
    finally:
        threading.stack_size(usual)
    started.wait()
    return pool


def _made(grammar: Grammar, tokenizer: "LLTokenizer") -> Any:
    """Return llguidance's matcher."""
    if not isinstance(grammar.text, str) or not grammar.text.strip():
        raise InputError(f"the grammar ({grammar.kind}) is {str(grammar.text)[:40]!r}; give a text")
    if len(grammar.text) > MOST_TEXT:
        raise InputError(f"the grammar ({grammar.kind}) has {len(grammar.text)} characters; give at most {MOST_TEXT}")
    try:
        made = _library().LLMatcher(tokenizer, _source(grammar), log_level=0)
        reason = made.get_error() if made.is_error() else None
    except InputError:
        raise
    except Exception as error:  # of several kinds, for what is nested too deeply, or holds half a character
        made, reason = None, str(error)
    if reason is not None:
        raise InputError(f"the grammar ({grammar.kind}) cannot be used: {_line(reason)}; correct it")
    return made


def _source(grammar: Grammar) -> str:
    """The grammar as llguidance wants it, with what may come before it."""
    source = _bare_source(grammar)
    if not grammar.thinks:
        return source
    (answer,) = [{"lark_grammar": source}] if grammar.kind == "lark" else json.loads(source)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": THOUGHT}, answer | {"name": "answer"}]})


def _bare_source(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    if grammar.kind not in KINDS:
        raise InputError(f"the kind of a grammar is {grammar.kind!r}; give one of {', '.join(KINDS)}")
    if grammar.kind == "json_schema":
        try:
            json.loads(grammar.text)
        except ValueError as error:
            raise InputError(f"the JSON schema is not JSON: {error}; correct it") from error
        return LLMatcher.grammar_from_json_schema(grammar.text, defaults=JSON_STYLE)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise InputError("grammars need llguidance, which is not installed; pip install 'dflash-jax[serve]'") from None
    return llguidance


def _line(text: str) -> str:
    """A message of several lines as one, at most 300 characters of it."""
    return " ".join(text.split())[:300]
