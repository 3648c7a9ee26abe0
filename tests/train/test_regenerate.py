import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash_jax.models.target import Target
from train.regenerate import RegenerateConfig, Responses, assemble, cut_prompts, decode, regenerate
from train.target import Architecture

TINY = Architecture(
    hidden_size=16, periods=1, period=2, num_heads=2, num_kv_heads=1, head_dim=8, delta_k_heads=1, delta_v_heads=2,
    delta_head_dim=8, num_experts=4, expert_size=8, shared_expert_size=8,
)  # fmt: skip
VOCAB, END, LINE = 24, 0, 3
CONFIG = RegenerateConfig(count=8, shortest=4, longest=9, response=7, sampled=0.5, batch=4)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(TINY.target_config(VOCAB, END), rngs=nnx.Rngs(1))


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCAB, size).astype(np.int32) for size in (80, 40, 30)]


def starts() -> np.ndarray:
    return np.arange(VOCAB) == LINE


def test_greedy_responses_are_the_argmax_of_the_whole_sequence(target):
    prompts, lengths = cut_prompts(documents(), starts(), CONFIG)
    graph, params = nnx.split(target)
    greedy = jnp.zeros(CONFIG.count)
    made = decode(params, prompts, lengths, greedy, jax.random.key(0), graph=graph, response=CONFIG.response, end=END)
    data = assemble(prompts, lengths, np.asarray(made), END)
    best = np.asarray(target.head(target.sequence(jnp.asarray(data.tokens)).hidden)).argmax(-1)
    for row in range(CONFIG.count):
        response = slice(data.prompts[row], data.lengths[row])
        np.testing.assert_array_equal(
            data.tokens[row, response], best[row, data.prompts[row] - 1 : data.lengths[row] - 1]
        )


def test_prompts_begin_at_lines_and_are_pieces_of_the_documents():
    prompts, lengths = cut_prompts(documents(), starts(), dataclasses.replace(CONFIG, count=50))
    joined = [" ".join(map(str, document)) for document in documents()]
    assert lengths.min() >= CONFIG.shortest and lengths.max() <= CONFIG.longest
    for prompt, length in zip(prompts, lengths, strict=True):
        piece = " ".join(map(str, prompt[:length]))
        assert any(f"{LINE} {piece}" in text or text.startswith(piece) for text in joined)


def test_responses_end_with_their_first_end_token():
    prompts = np.array([[5, 6, 0], [7, 8, 9]], np.int32)
    data = assemble(prompts, np.array([2, 3]), np.array([[4, END, END, END], [4, 5, 6, 7]]), END)
    np.testing.assert_array_equal(data.tokens, [[5, 6, 4, END, 0, 0, 0], [7, 8, 9, 4, 5, 6, 7]])
    np.testing.assert_array_equal(data.loss_mask(), [[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]])


def test_a_stopped_run_goes_on_and_ends_the_same(target, tmp_path):
    whole = regenerate(target, documents(), starts(), END, CONFIG, tmp_path / "a")
    regenerate(target, documents(), starts(), END, CONFIG, tmp_path / "b")
    (tmp_path / "b" / "000004.npz").unlink()
    first = (tmp_path / "b" / "000000.npz").stat().st_mtime_ns
    again = regenerate(target, documents(), starts(), END, CONFIG, tmp_path / "b")
    assert (tmp_path / "b" / "000000.npz").stat().st_mtime_ns == first
    for field in dataclasses.fields(Responses):
        np.testing.assert_array_equal(getattr(whole, field.name), getattr(again, field.name))
