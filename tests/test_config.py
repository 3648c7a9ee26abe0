"""config.json in, config.json out: every published layout is understood, and the rest is refused by name."""

import json

import pytest
import transformers

from dflash_jax.config import DrafterConfig, GatedDeltaConfig, MoeConfig, RopeConfig, TargetConfig, load_config
from dflash_jax.errors import InputError
from tests.published_configs import (
    DRAFTER,
    GPT_OSS,
    LLAMA31,
    QWEN3_8B_DRAFTER,
    QWEN3_CODER,
    QWEN3_NEXT,
    QWEN35_397B,
)

HYBRID_TYPES = ("linear_attention", "linear_attention", "linear_attention", "full_attention")


def test_llama31_reads_llama3_rope_and_several_stop_tokens():
    config = TargetConfig.from_dict(LLAMA31)
    rope = RopeConfig(5e5, 128, "llama3", 8.0, 8192, 1.0, 4.0)
    assert (config.rope, config.head_dim, config.num_layers) == (rope, 128, 32)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert not (config.qkv_bias or config.o_bias or config.qk_norm or config.mlp_bias)


def test_qwen3_moe_takes_either_name_for_the_number_of_experts():
    config = TargetConfig.from_dict(QWEN3_CODER)
    assert config.moe == MoeConfig(128, 8, 768, norm_topk=True) and config.qk_norm
    renamed = {k: v for k, v in QWEN3_CODER.items() if k != "num_experts"} | {"num_local_experts": 128}
    assert TargetConfig.from_dict(renamed) == config
    with pytest.raises(InputError, match=r"num_local_experts.*disagree"):
        TargetConfig.from_dict(QWEN3_CODER | {"num_local_experts": 64})


@pytest.mark.parametrize(
    ("options", "dense"),
    [({"mlp_only_layers": [1, 5]}, (1, 5)), ({"decoder_sparse_step": 2}, tuple(range(0, 48, 2))), ({}, ())],
)
def test_dense_layers_among_sparse_ones(options, dense):
    config = TargetConfig.from_dict(QWEN3_CODER | options)
    assert config.dense_layers == dense
    assert [i for i in range(48) if not config.is_sparse(i)] == list(dense)
    assert TargetConfig.from_dict(config.to_dict()) == config


def test_qwen3_next_derives_the_layer_rhythm_and_partial_rope():
    config = TargetConfig.from_dict(QWEN3_NEXT)
    assert config.layer_types == HYBRID_TYPES * 12
    assert config.rope == RopeConfig(1e7, 64)
    assert config.gated_delta == GatedDeltaConfig(16, 32, 128, 128, 4)
    assert config.gated_attention and config.norm == "zero_centred" and config.moe.shared_intermediate_size == 512


def test_the_text_model_of_a_vision_language_wrapper():
    config = TargetConfig.from_dict(QWEN35_397B)
    assert config.family == "qwen3_5_moe" and config.layer_types == HYBRID_TYPES
    assert config.rope == RopeConfig(1e7, 64) and config.moe == MoeConfig(512, 10, 1024, 1024)
    assert config.eos_token_ids == (248044,)
    assert config.to_dict()["model_type"] == "qwen3_5_moe_text"
    assert TargetConfig.from_dict(QWEN35_397B["text_config"]) == config


def test_a_wrapper_rules_over_tying_and_stop_tokens():
    config = TargetConfig.from_dict(QWEN35_397B | {"tie_word_embeddings": True, "eos_token_id": [7, 8]})
    assert config.tie_word_embeddings and config.eos_token_ids == (7, 8)


def test_gpt_oss_with_mxfp4_weights():
    config = TargetConfig.from_dict(GPT_OSS)
    assert config.moe == MoeConfig(32, 4, 2880, softmax_after_topk=True, bias=True, swiglu_limit=7.0)
    assert config.rope == RopeConfig(15e4, 64, "yarn", 32.0, 4096, truncate=False)
    assert (config.sinks, config.sliding_window, config.norm) == (True, 128, "fp32_scale")
    assert config.qkv_bias and config.o_bias
    without = {k: v for k, v in GPT_OSS.items() if k != "layer_types"}
    assert TargetConfig.from_dict(without).layer_types == config.layer_types


@pytest.mark.parametrize(
    ("model_type", "attributes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "eos_token_id": [4, 9]}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3, "tie_word_embeddings": True}),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}}),
        ("qwen3_moe", {"use_sliding_window": True, "norm_topk_prob": True, "head_dim": 96}),
        ("qwen3_next", {"mlp_only_layers": [2], "norm_topk_prob": False}),
        (
            "qwen3_5_text",
            {
                "head_dim": 44,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 30 / 44 + 1e-9},
            },
        ),
        ("qwen3_5_moe_text", {"num_experts": 12}),
        ("gpt_oss", {"swiglu_limit": 3.0, "sliding_window": 17}),
    ],
)
def test_transformers_reads_what_is_written(model_type, attributes):
    """Ours -> config.json -> transformers gives back the configuration that transformers wrote."""
    theirs = transformers.AutoConfig.for_model(model_type, num_hidden_layers=6, dtype="float32", **attributes)
    config = TargetConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False)))
    again = transformers.AutoConfig.for_model(**config.to_dict())
    written, expected = again.to_dict(), theirs.to_dict()
    bookkeeping = {
        "architectures",
        "dtype",
        "max_window_layers",
        "decoder_sparse_step",
        "initializer_range",
        "bos_token_id",
    }
    differing = {k for k in expected if written.get(k) != expected[k]} - bookkeeping
    if model_type.startswith("qwen3_5") and differing == {
        "rope_parameters"
    }:  # a fraction that rotates as many dimensions
        pairs = [int(44 * c["rope_parameters"]["partial_rotary_factor"]) for c in (written, expected)]
        assert pairs == [30, 30]
    else:
        assert not differing, {k: (written.get(k), expected[k]) for k in differing}
    assert TargetConfig.from_dict(json.loads(again.to_json_string(use_diff=False))) == config


def test_a_window_that_is_switched_off_or_absent_is_none():
    """transformers, too, makes every layer full then."""
    for changes in ({"sliding_window": 8}, {"use_sliding_window": True, "sliding_window": None}):
        config = TargetConfig.from_dict(LLAMA31 | {"model_type": "qwen3", "max_window_layers": 0} | changes)
        assert config.sliding_window is None and set(config.layer_types) == {"full_attention"}


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_both_styles_of_rope_say_the_same(kind):
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 512}
    scaling |= {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {"mscale": 1.0, "mscale_all_dim": 0.7},
    }.get(kind, {})
    if kind in ("default", "linear"):
        del scaling["original_max_position_embeddings"]
    base = {k: v for k, v in LLAMA31.items() if k not in ("rope_theta", "rope_scaling")}
    old = base | {
        "rope_theta": 7e4,
        "rope_scaling": {"type": scaling["rope_type"]} | {k: v for k, v in scaling.items() if k != "rope_type"},
    }
    new = base | {"rope_parameters": scaling | {"rope_theta": 7e4}}
    config = TargetConfig.from_dict(old)
    assert config == TargetConfig.from_dict(new) and config.rope.kind == kind and config.rope.theta == 7e4
    assert TargetConfig.from_dict(config.to_dict()) == config


def test_yarn_keeps_an_explicit_attention_factor_and_derives_its_scale():
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 32768, "attention_factor": 1.25, "rope_theta": 1e6}
    rope = TargetConfig.from_dict(LLAMA31 | {"rope_scaling": None, "rope_parameters": yarn}).rope
    assert (rope.attention_factor, rope.factor, rope.truncate) == (1.25, 4.0, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3'.*supported targets are llama, qwen2"),
        ({"logit_scale": 0.5}, "not understood: logit_scale"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' or 'swish'"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic', supported are default, llama3, yarn, linear",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "not understood: beta_fast"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "not understood: full_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8' is not supported for llama"),
        ({"use_sliding_window": True}, "use_sliding_window is true, which llama does not have"),
        ({"model_type": "qwen3", "sliding_window": 0}, "sliding_window is 0, a whole number of at least 1"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 32},
            r"layer_types holds \['sliding_attention'\].*sliding layers need sliding_window",
        ),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
        ({"hidden_size": "big"}, "hidden_size is 'big', a whole number"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for num_hidden_layers 32"),
        ({"layer_types": ["chunked_attention"] * 32}, r"layer_types holds \['chunked_attention'\]"),
        ({"architectures": ["DFlashDraftModel"]}, "that of a DFlash drafter"),
    ],
)
def test_a_target_that_cannot_work_is_refused(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        TargetConfig.from_dict(LLAMA31 | changes)
    assert "\n" not in str(caught.value)


def test_ungated_attention_of_qwen3_5_is_refused():
    text = QWEN35_397B["text_config"] | {"attn_output_gate": False}
    with pytest.raises(InputError, match="attn_output_gate is False, only True"):
        TargetConfig.from_dict(text)


def test_a_sliding_drafter_is_causal_in_its_sliding_layers():
    config = DrafterConfig.from_dict(DRAFTER)
    assert config.causal == (True,) * 5 + (False,) and config.sliding_window == 4096
    assert (config.block_size, config.mask_token_id, config.num_target_layers) == (16, 248077, 60)
    assert config.tap_ids == (1, 9, 17, 25, 33, 41, 49, 57) and config.rope == RopeConfig(1e7, 128)
    assert not config.is_dflash2 and DrafterConfig.from_dict(config.to_dict()) == config


def test_an_early_drafter_without_layer_types():
    config = DrafterConfig.from_dict(QWEN3_8B_DRAFTER)
    assert config.layer_types == ("full_attention",) * 5 and config.causal == (False,) * 5
    assert config.sliding_window is None and config.rope.theta == 1e6 and config.block_size == 16
    assert DrafterConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("top", "is_causal", True),
        ("top", "is_causal", False),
        ("dflash_config", "causal", True),
        ("dflash_config", "causal", False),
    ],
)
def test_causality_can_be_said_outright(place, key, value):
    changed = (
        DRAFTER | {key: value}
        if place == "top"
        else DRAFTER | {"dflash_config": DRAFTER["dflash_config"] | {key: value}}
    )
    config = DrafterConfig.from_dict(changed)
    assert config.causal == (value,) * 6 and DrafterConfig.from_dict(config.to_dict()) == config


def test_the_top_level_is_causal_wins():
    nested = DRAFTER["dflash_config"] | {"causal": True}
    assert DrafterConfig.from_dict(DRAFTER | {"dflash_config": nested, "is_causal": False}).causal == (False,) * 6


def test_every_setting_is_found_in_either_place():
    moved = {k: v for k, v in DRAFTER.items() if k not in ("dflash_config", "num_target_layers")} | DRAFTER[
        "dflash_config"
    ]
    moved["dflash_config"] = {"num_target_layers": 60}
    assert DrafterConfig.from_dict(moved) == DrafterConfig.from_dict(DRAFTER)


@pytest.mark.parametrize(
    ("layers", "target_layers", "taps"),
    [(5, 36, (1, 9, 17, 25, 33)), (8, 48, (1, 7, 14, 20, 26, 32, 39, 45)), (1, 36, (18,))],
)
def test_default_taps_are_spread_over_the_target(layers, target_layers, taps):
    changes = {"num_hidden_layers": layers, "num_target_layers": target_layers, "dflash_config": {"mask_token_id": 3}}
    assert DrafterConfig.from_dict(QWEN3_8B_DRAFTER | changes).tap_ids == taps


def test_a_gpt_oss_drafter_has_biases_and_yarn():
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
    changes = {"model_type": "gpt_oss", "attention_bias": True, "rope_scaling": rope, "rope_theta": 150000}
    config = DrafterConfig.from_dict(QWEN3_8B_DRAFTER | changes)
    assert config.attention_bias and config.rope == RopeConfig(15e4, 128, "yarn", 32.0, 4096, truncate=False)
    assert DrafterConfig.from_dict(config.to_dict()) == config


def test_dflash2_keys_and_their_defaults():
    values = QWEN3_8B_DRAFTER | {"architectures": ["DFlash2DraftModel"]}
    config = DrafterConfig.from_dict(values)
    sizes = (config.conv_kernel_size, config.conv_group_size, config.selector_rank, config.selector_top_k)
    assert sizes == (2, 16, 256, 16) and config.is_dflash2
    nested = values["dflash_config"] | {
        "selector_rank": 8,
        "final_logit_softcapping": 30.0,
        "input_embedding_scale": 2.0,
    }
    config = DrafterConfig.from_dict(values | {"dflash_config": nested, "output_multiplier": 0.5})
    assert (config.selector_rank, config.final_logit_softcapping) == (8, 30.0)
    assert (config.input_embedding_scale, config.output_multiplier) == (2.0, 0.5)
    assert DrafterConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["Eagle3Model"]},
            "architectures.*Eagle3Model.*is not a drafter, supported are DFlashDraftModel",
        ),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported for a drafter"),
        ({"gate_scale": 2.0}, "not understood: gate_scale"),
        ({"dflash_config": {"mask_token_id": 1, "markov_rank": 4}}, "not understood: dflash_config.markov_rank"),
        ({"block_size": None}, "block_size is missing"),
        ({"block_size": 1}, "block_size is 1, a whole number of at least 2"),
        (
            {"dflash_config": {"mask_token_id": 1, "block_size": 8}},
            "block_size is 16 at the top level and 8 in dflash_config",
        ),
        ({"dflash_config": {}}, "mask_token_id is missing"),
        ({"dflash_config": {"mask_token_id": 151936}}, "mask_token_id 151936 is outside the vocabulary of 151936"),
        (
            {"dflash_config": {"mask_token_id": 1, "target_layer_ids": [1, 36]}},
            r"target_layer_ids \[1, 36\] must lie in 0 to 35",
        ),
        ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [-1]}}, r"target_layer_ids is \[-1\]"),
        ({"num_target_layers": None, "dflash_config": {"mask_token_id": 1}}, "num_target_layers is"),
        ({"layer_types": ["sliding_attention"] * 5}, "sliding_window is missing"),
        ({"layer_types": ["linear_attention"] * 5}, "layer_types is"),
        ({"conv_kernel_size": 3}, "conv_kernel_size is 3, only 2"),
        ({"is_causal": "yes"}, "is_causal is 'yes'"),
    ],
)
def test_a_drafter_that_cannot_work_is_refused(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        DrafterConfig.from_dict(QWEN3_8B_DRAFTER | changes)
    assert "\n" not in str(caught.value)


def test_load_config_prefers_the_stop_tokens_of_generation(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_CODER))
    assert TargetConfig.from_dict(load_config(tmp_path)).eos_token_ids == (151645,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    assert TargetConfig.from_dict(load_config(tmp_path)).eos_token_ids == (151645, 151643)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "has no config.json"), ("{", "not valid JSON"), ("[1]", "holds a list")]
)
def test_load_config_says_what_is_wrong_with_the_file(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        load_config(tmp_path / "nowhere")
