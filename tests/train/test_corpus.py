from pathlib import Path

import numpy as np
import pytest

from train import corpus

LONG = "".join(f"    x = {i}\n" for i in range(20))
DEEPER = LONG.replace("    ", "        ")


@pytest.fixture
def library(tmp_path) -> Path:
    files = {
        "argparse.py": "import os\n",
        "heapq.py": f"def push(heap):\n{LONG}\nclass Heap(list):\n    @property\n    def top(self):\n{DEEPER}",
        "json/decoder.py": f"def scan():\n{LONG}",
        "test/test_os.py": "x = 1\n",
        "unittest/test/case.py": "x = 1\n",
        "site-packages/jax.py": "x = 1\n",
        "_sysconfigdata__linux.py": "x = 1\n",
        "empty.py": "\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    return tmp_path


def test_split_keeps_library_code_and_holds_modules_out_by_name(library):
    train, held_out = corpus.split(library)
    assert [document.name for document in train] == ["argparse.py"]
    assert [document.name for document in held_out] == ["heapq.py", "json/decoder.py"]


def test_prompts_are_beginnings_of_functions_taken_from_the_modules_in_turn(library):
    prompts = corpus.held_out_prompts(10, library)
    assert [prompt.splitlines()[0] for prompt in prompts] == ["def push(heap):", "def scan():", "class Heap(list):"]
    assert prompts[2].startswith("class Heap(list):\n\n    @property\n    def top(self):\n        x = 0\n")
    assert corpus.held_out_prompts(2, library) == prompts[:2]


def test_this_machine_has_a_corpus_and_prompts():
    train, held_out = corpus.split()
    assert sum(len(document.text) for document in train) > 5e6
    assert not corpus.HELD_OUT.intersection(document.name for document in train)
    assert len(held_out) >= 10
    assert len(set(corpus.held_out_prompts(40))) == 40


def test_prompts_of_documents_begin_at_lines_and_are_pieces_of_them():
    rng = np.random.default_rng(0)
    line, config = 3, corpus.PromptConfig(count=50, shortest=4, longest=9)
    documents = [rng.integers(1, 24, size).astype(np.int32) for size in (80, 40, 30)]
    joined = [" ".join(map(str, document)) for document in documents]
    for prompt in corpus.cut_prompts(documents, np.arange(24) == line, config):
        assert config.shortest <= len(prompt) <= config.longest
        piece = " ".join(map(str, prompt))
        assert any(f"{line} {piece}" in text or text.startswith(piece) for text in joined)
