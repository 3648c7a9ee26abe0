"""The training text of the embedded pair: the Python standard library of the machine that runs this."""

import ast
import dataclasses
import functools
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from train.data import generator

# Tests, generated tables and programs that are no ordinary library code.
EXCLUDED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"} | {
    "encodings", "pydoc_data", "turtledemo", "__phello__", "ensurepip",
}  # fmt: skip
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "__hello__", "__phello__", "this.py", "antigravity.py")

# Never trained on: the demo's prompts and the held-out loss come from these modules.
HELD_OUT = {
    "bisect.py", "calendar.py", "colorsys.py", "csv.py", "fractions.py", "graphlib.py", "heapq.py", "http/cookies.py",
    "json/decoder.py", "logging/handlers.py", "queue.py", "shlex.py", "statistics.py", "string.py", "textwrap.py",
    "tomllib/_parser.py", "urllib/robotparser.py", "wsgiref/headers.py", "zipapp.py",
}  # fmt: skip

LICENCE_NOTE = """The models in this folder were trained on the source files of the Python standard library, which are
Copyright (c) 2001 Python Software Foundation; All Rights Reserved, and are licensed under the Python Software
Foundation License Version 2 (https://docs.python.org/3/license.html). prompts.jsonl quotes parts of those files.
"""


@dataclasses.dataclass(frozen=True)
class Document:
    """One source file: its path inside the library (with "/") and its text."""

    name: str
    text: str


def library_root() -> Path:
    """Where the standard library's sources lie on this machine."""
    return Path(sysconfig.get_path("stdlib"))


def _wanted(relative: Path) -> bool:
    inside = not EXCLUDED_FOLDERS.intersection(relative.parts[:-1])
    return inside and not any(part.startswith(EXCLUDED_PREFIXES) for part in relative.parts)


def list_files(root: Path | None = None) -> list[Path]:
    """The corpus' files, sorted by their path inside the library."""
    root = root or library_root()
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(filter(_wanted, relative), key=Path.as_posix)]


def read_documents(root: Path | None = None) -> Iterator[Document]:
    """Every file that is not empty, as text. Files in another encoding than UTF-8 are left out."""
    root = root or library_root()
    for path in list_files(root):
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(path.relative_to(root).as_posix(), text)


@functools.cache
def split(root: Path | None = None) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """(train, held out) documents."""
    documents = tuple(read_documents(root))
    train = tuple(document for document in documents if document.name not in HELD_OUT)
    held_out = tuple(document for document in documents if document.name in HELD_OUT)
    return train, held_out


def _functions(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | None, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield None, node
        elif isinstance(node, ast.ClassDef):
            yield from ((node, child) for child in node.body if isinstance(child, ast.FunctionDef))


def prompts_of(document: Document, lines: int = 8) -> list[str]:
    """The first lines of every function twice as long: with its class' header, where it has one.

    They end where a line does, before the line break: the tokenizer has one token for a line break with the
    indentation after it, so a prompt that ends with a bare one reads like the end of a file.
    """
    source = document.text.splitlines(keepends=True)
    prompts = []
    for parent, function in _functions(ast.parse(document.text)):
        start = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)]) - 1
        if (function.end_lineno or 0) - start < 2 * lines:
            continue
        header = "" if parent is None else source[parent.lineno - 1] + "\n"
        prompts.append(header + "".join(source[start : start + lines]).rstrip("\n"))
    return prompts


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Prompts for the target, cut from the documents at random line starts.

    Args:
        count: how many
        shortest: tokens of the shortest
        longest: tokens of the longest
        seed: of the cuts
    """

    count: int = 3072
    shortest: int = 16
    longest: int = 96
    seed: int = 0


def cut_prompts(documents: Sequence[np.ndarray], starts: np.ndarray, config: PromptConfig) -> list[list[int]]:
    """`count` prompts that begin at lines; `starts[id]` says whether token `id` ends with a line's beginning."""
    rng = generator(config.seed, 2)
    sizes = np.array([len(document) for document in documents], float)
    chosen = rng.choice(len(documents), config.count, p=sizes / sizes.sum())
    lengths = rng.integers(config.shortest, config.longest + 1, config.count)
    prompts = []
    for tokens, length in zip((documents[i] for i in chosen), lengths, strict=True):
        breaks = np.flatnonzero(starts[tokens[: max(0, len(tokens) - config.longest)]])
        first = int(rng.choice(breaks)) + 1 if len(breaks) else 0
        prompts.append(tokens[first : first + length].tolist())
    return prompts


def held_out_prompts(count: int, root: Path | None = None) -> list[str]:
    """`count` prompts of held-out code (fewer if there are not so many), taken from the modules in turn."""
    pools = [prompts_of(document) for document in split(root)[1]]
    turns = range(max(map(len, pools), default=0))
    return [pool[turn] for turn in turns for pool in pools if turn < len(pool)][:count]
