"""What is written, transformers loads back to the same logits, with no tensor left over."""

import numpy as np
import pytest

pytest.importorskip("torch")

import jax.numpy as jnp
import transformers
from safetensors.numpy import load_file

from dflash_jax.checkpoints import load_target, save_target
from tests import torch_models

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("case", torch_models.CASES)
def test_transformers_loads_an_exported_target(tmp_path, case):
    reference = torch_models.save(case, tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, torch_models.VOCAB, (2, 9))
    _, target = load_target(tmp_path / "theirs")
    save_target(target, tmp_path / "ours", shard_bytes=60_000 if case == "qwen3_5" else 10**9)
    again = torch_models.load(tmp_path / "ours")
    for ours, theirs in zip(torch_models.outputs(again, tokens), torch_models.outputs(reference, tokens), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "gpt_oss"])
def test_the_written_tensors_are_those_of_transformers(tmp_path, case):
    """Name by name and bit by bit, so other engines that read such checkpoints read ours."""
    torch_models.save(case, tmp_path / "theirs")
    save_target(load_target(tmp_path / "theirs")[1], tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_the_text_model_of_a_vision_language_checkpoint(tmp_path):
    """As transformers saves it, vision tower and all; text only, its three position rows are equal."""
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 40}
    text = torch_models.CASES["qwen3_5_moe"][1]
    wrapper = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    reference = transformers.Qwen3_5MoeForConditionalGeneration(wrapper).eval()
    torch_models.randomise(reference, 1)
    reference.save_pretrained(tmp_path)
    assert any(key.startswith("model.visual.") for key in load_file(tmp_path / "model.safetensors"))
    tokens = np.random.default_rng(0).integers(0, torch_models.VOCAB, (2, 9))
    _, target = load_target(tmp_path)
    logits = target.head(target.sequence(jnp.asarray(tokens)).hidden)
    np.testing.assert_allclose(logits, torch_models.outputs(reference, tokens)[0], atol=1e-4)
