"""The pair that ships with the package: small enough, readable by others, and good at its work."""

import json

import numpy as np
import pytest

import dflash_jax
from dflash_jax.checkpoints import save_drafter, save_target
from dflash_jax.pair import EMBEDDED
from tests.statistics import THRESHOLD, chi_square

PROMPTS = [json.loads(line)["prompt"] for line in (EMBEDDED / "prompts.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def pair():
    return dflash_jax.load()


@pytest.fixture(scope="module")
def both(pair):
    """Speculative and plain completions of the same held-out prompts."""
    ways = (dflash_jax.generate(pair, PROMPTS[:12], max_new_tokens=100, draft=draft) for draft in (True, False))
    return tuple(ways)


def test_output_is_that_of_plain_decoding(both):
    speculative, plain = both
    assert [g.tokens for g in speculative] == [g.tokens for g in plain]
    assert [g.text for g in speculative] == [g.text for g in plain]


def test_the_drafter_is_right_often(both):
    """At least three tokens a round, on code that neither model was trained on."""
    lengths = [length for generation in both[0] for length in generation.acceptance_lengths]
    assert np.mean(lengths) >= 3.0
    assert all(length == 1 for generation in both[1] for length in generation.acceptance_lengths)


def test_sampled_output_has_the_distribution_of_plain_sampling(pair):
    """Three tokens, one of the prompt's pass and two of the first block, each of the three likeliest."""
    prompt, batch, calls = pair.tokenizer.encode("import sys\nimport os\nimport"), 32, 12
    paths, probabilities = np.array([prompt]), np.ones(1)
    for _ in range(3):
        logits = np.asarray(pair.logits(paths), np.float64)[:, -1]
        likeliest = np.argsort(-logits, -1)[:, :3]
        weights = np.exp(np.take_along_axis(logits, likeliest, -1))
        probabilities = (probabilities[:, None] * weights / weights.sum(-1, keepdims=True)).ravel()
        paths = np.concatenate([np.repeat(paths, 3, 0), likeliest.reshape(-1, 1)], 1)
    drawn = []
    for seed in range(0, batch * calls, batch):
        settings = {"max_new_tokens": 3, "temperature": 1.0, "top_k": 3, "seed": list(range(seed, seed + batch))}
        drawn += [tuple(made.tokens) for made in dflash_jax.generate(pair, [prompt] * batch, **settings)]
    counts = np.array([drawn.count(tuple(path[-3:])) for path in paths.tolist()])
    assert counts.sum() == batch * calls
    assert chi_square(counts, probabilities) > THRESHOLD


def test_a_stream_is_the_generation_in_pieces(pair, both):
    pieces, end = [], None
    stream = dflash_jax.stream(pair, PROMPTS[1], max_new_tokens=100)
    while end is None:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            end = stop.value
    assert end == dflash_jax.generate(pair, PROMPTS[1], max_new_tokens=100)[0]
    assert end.tokens == both[0][1].tokens
    assert "".join(piece.text for piece in pieces) == end.text
    assert sum(sum(piece.drafted) for piece in pieces) > len(end.tokens) / 2


def test_it_is_small():
    size = sum(path.stat().st_size for path in EMBEDDED.rglob("*.safetensors"))
    assert 1e6 < size <= 16e6


def test_it_is_written_as_it_was_read(pair, tmp_path):
    """Export of what was loaded gives the same files: nothing is lost on the way in or out."""
    save_target(pair.target, tmp_path / "target", "bfloat16")
    save_drafter(pair.drafter, tmp_path / "drafter", "bfloat16")
    for part in ("target", "drafter"):
        again = (tmp_path / part / "model.safetensors").read_bytes()
        assert again == (EMBEDDED / part / "model.safetensors").read_bytes()


def test_transformers_gives_the_same_logits(pair):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    tokens = np.array([tokenizer(PROMPTS[0])["input_ids"]])
    assert tokens[0].tolist() == pair.tokenizer.encode(PROMPTS[0])
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "target", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(pair.logits(tokens), expected, atol=1e-3)
