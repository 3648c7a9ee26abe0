"""What a checkpoint says twice is resolved as transformers 5 does, or refused; nothing is dropped in silence."""

import jax.numpy as jnp
import numpy as np
import pytest

import dflash_jax
from dflash_jax.checkpoints import load_target
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.errors import InputError
from tests.checkpoints.folders import DRAFTERS, TARGETS, change, change_config, target_folder

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
READERS = {"target": (TargetConfig, TARGETS["llama"]), "drafter": (DrafterConfig, DRAFTERS["dflash"])}
TOKENS = [[3, 9, 27, 5, 11]]


def rope_of(which, **changes):
    config, values = READERS[which]
    kept = {key: value for key, value in values.items() if "rope" not in key}
    return config.from_dict(kept | changes).rope


@pytest.mark.parametrize("which", READERS)
def test_rope_scaling_replaces_rope_parameters(which):
    alone = rope_of(which, rope_theta=5000.0, rope_scaling=YARN)
    assert (alone.kind, alone.factor, alone.theta, alone.original_max_position) == ("yarn", 4.0, 5000.0, 16)
    assert rope_of(which, rope_theta=5000.0, rope_scaling=YARN, rope_parameters=PLAIN) == alone
    assert rope_of(which, rope_scaling=YARN | {"rope_theta": 5000.0}, rope_parameters=PLAIN) == alone
    assert rope_of(which, rope_parameters=PLAIN | YARN, rope_scaling=None) == alone
    assert rope_of(which, rope_parameters=PLAIN | YARN, rope_scaling={}) == alone
    linear = rope_of(
        which, rope_theta=5000.0, rope_parameters=PLAIN | YARN, rope_scaling={"type": "linear", "factor": 2}
    )
    assert (linear.kind, linear.factor) == ("linear", 2.0)


@pytest.mark.parametrize("which", READERS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": PLAIN, "rope_scaling": YARN},
            "rope_theta 10000.0 counts, and rope_parameters says 5000.0",
        ),
        (
            {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}, "rope_scaling": YARN, "rope_theta": 5000.0},
            "partial_rotary_factor 1.0 counts, and rope_parameters says 0.5",
        ),
        (
            {"rope_theta": 5000.0, "rope_scaling": YARN, "original_max_position_embeddings": 33},
            "original_max_position_embeddings 16 counts, and the top level says 33",
        ),
    ],
)
def test_a_value_that_would_be_lost_is_refused(which, changes, message):
    with pytest.raises(InputError, match=message):
        rope_of(which, **changes)


def wrapped(text, **outer):
    return {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {"depth": 2}, **outer}


def test_settings_beside_text_config_are_those_in_it_or_refused():
    text = TARGETS["qwen3_5_moe"]
    config = TargetConfig.from_dict(text)
    assert TargetConfig.from_dict(wrapped(text, hidden_size=text["hidden_size"], image_token_id=9)) == config
    for outer in ({"hidden_size": 48}, {"rope_scaling": YARN}, {"max_position_embeddings": 7}):
        with pytest.raises(InputError, match=rf"{next(iter(outer))} .* stands beside text_config"):
            TargetConfig.from_dict(wrapped(text, **outer))
    assert TargetConfig.from_dict(wrapped(text, eos_token_id=[4, 5])).eos_token_ids == (4, 5)


def test_a_head_of_its_own_is_kept_whatever_config_json_says(tmp_path):
    """And a copy of the embedding, which some writers store, is dropped."""
    model = target_folder(tmp_path, "llama_tied")
    change(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    config, tied = load_target(tmp_path)
    assert config.tie_word_embeddings and tied.lm_head is None
    head = np.random.default_rng(9).normal(size=model.embed.embedding.shape).astype(np.float32)
    change(tmp_path, lambda tensors: tensors | {"lm_head.weight": head})
    config, loaded = load_target(tmp_path)
    assert not config.tie_word_embeddings and not loaded.config.tie_word_embeddings
    np.testing.assert_array_equal(loaded.lm_head.kernel[...], head.T)
    change(tmp_path, lambda tensors: tensors | {"lm_head.weight": head[:-1]})
    with pytest.raises(InputError, match=r"lm_head.weight has shape \[63, 32\], expected \[64, 32\]"):
        load_target(tmp_path)


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (True, None), (None, True)])
def test_a_head_in_a_wrapper_is_kept_whoever_says_tied(tmp_path, outer, inner):
    model = target_folder(tmp_path, "qwen3_5_moe")

    def wrap(text):
        said = {} if outer is None else {"tie_word_embeddings": outer}
        return wrapped({**text, "tie_word_embeddings": inner}, **said)

    change_config(tmp_path, wrap)
    np.testing.assert_array_equal(load_target(tmp_path)[1].lm_head.kernel[...], model.lm_head.kernel[...])


@pytest.mark.torch
def test_logits_with_a_head_of_its_own_are_those_of_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    target_folder(tmp_path, "llama_tied")
    head = np.random.default_rng(9).normal(size=(64, 32)).astype(np.float32)
    change(tmp_path, lambda tensors: tensors | {"lm_head.weight": head})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(dflash_jax.load(tmp_path, dtype=jnp.float32).logits(TOKENS), expected, atol=1e-3)
