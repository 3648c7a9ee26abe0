import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from dflash_jax.models.target import Target
from dflash_jax.pair import Pair
from dflash_jax.text import Tokenizer
from tests.train import tiny
from train.regenerate import RegenerateConfig, Responses, cut_prompts, regenerate, write_responses

VOCAB, END, LINE = 24, 0, 3
CONFIG = RegenerateConfig(count=8, shortest=4, longest=9, response=7, sampled=0.5, batch=4)


@pytest.fixture(scope="module")
def pair() -> Pair:
    target = Target(tiny.TARGET.target_config(VOCAB, END), rngs=nnx.Rngs(1))
    return Pair(target, None, Tokenizer(None, Path(), VOCAB))


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCAB, size).astype(np.int32) for size in (80, 40, 30)]


def starts() -> np.ndarray:
    return np.arange(VOCAB) == LINE


def test_greedy_responses_are_the_argmax_of_the_whole_sequence(pair):
    data = write_responses(pair, cut_prompts(documents(), starts(), CONFIG), np.zeros(CONFIG.count), 0, CONFIG.response)
    best = np.asarray(pair.logits(data.tokens)).argmax(-1)
    for row in range(CONFIG.count):
        response = slice(data.prompts[row], data.lengths[row])
        np.testing.assert_array_equal(
            data.tokens[row, response], best[row, data.prompts[row] - 1 : data.lengths[row] - 1]
        )


def test_prompts_begin_at_lines_and_are_pieces_of_the_documents():
    prompts = cut_prompts(documents(), starts(), dataclasses.replace(CONFIG, count=50))
    joined = [" ".join(map(str, document)) for document in documents()]
    for prompt in prompts:
        assert CONFIG.shortest <= len(prompt) <= CONFIG.longest
        piece = " ".join(map(str, prompt))
        assert any(f"{LINE} {piece}" in text or text.startswith(piece) for text in joined)


def test_the_loss_counts_responses_alone():
    data = Responses.build([[5, 6, 4, END], [7, 8, 9, 4, 5, 6, 7]], [2, 3])
    np.testing.assert_array_equal(data.tokens, [[5, 6, 4, END, 0, 0, 0], [7, 8, 9, 4, 5, 6, 7]])
    np.testing.assert_array_equal(data.loss_mask(), [[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]])


def test_a_stopped_run_goes_on_and_ends_the_same(pair, tmp_path):
    whole = regenerate(pair, documents(), starts(), CONFIG, tmp_path)
    (tmp_path / "000004.npz").unlink()
    first = (tmp_path / "000000.npz").stat().st_mtime_ns
    again = regenerate(pair, documents(), starts(), CONFIG, tmp_path)
    assert (tmp_path / "000000.npz").stat().st_mtime_ns == first
    for field in dataclasses.fields(Responses):
        np.testing.assert_array_equal(getattr(whole, field.name), getattr(again, field.name))
