"""Every layout that the same weights come in loads to the same leaves."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dflash_jax.checkpoints import load_drafter, load_target, save_target
from tests.checkpoints.folders import (
    DRAFTERS,
    TARGETS,
    assert_same,
    change,
    change_config,
    drafter_folder,
    leaves,
    target,
    target_folder,
)


@pytest.mark.parametrize("name", TARGETS)
def test_a_saved_target_loads_bit_for_bit(tmp_path, name):
    model = target_folder(tmp_path, name)
    config, loaded = load_target(tmp_path)
    assert config == model.config == loaded.config
    assert_same(loaded, model)


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_saved_drafter_loads_bit_for_bit(tmp_path, name, prefix):
    model = drafter_folder(tmp_path, name)
    assert {"fc.weight", "hidden_norm.weight", "norm.weight"} <= load_file(tmp_path / "model.safetensors").keys()
    change(tmp_path, lambda tensors: {prefix + key: value for key, value in tensors.items()})
    config, loaded = load_drafter(tmp_path)
    assert config == model.config == loaded.config
    assert_same(loaded, model)


def test_a_saved_drafter_has_the_published_tensors(tmp_path):
    drafter_folder(tmp_path, "dflash2")
    D, queries, keys, columns, vocab, rank = 32, 32, 16, 64, 64, 5
    layer = {
        "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (queries, D), "self_attn.k_proj.weight": (keys, D),
        "self_attn.v_proj.weight": (keys, D), "self_attn.o_proj.weight": (D, queries),
        "self_attn.q_norm.weight": (8,), "self_attn.k_norm.weight": (8,),
        "mlp.gate_proj.weight": (columns, D), "mlp.up_proj.weight": (columns, D), "mlp.down_proj.weight": (D, columns),
        "attention_conv.base_kernel": (2, 2, D), "attention_conv.kernel_projection.weight": (2 * 2 * D // 16, D),
        "mlp_conv.base_kernel": (2, 2, D), "mlp_conv.kernel_projection.weight": (2 * 2 * D // 16, D),
    }  # fmt: skip
    expected = {f"layers.{i}.{key}": shape for i in range(2) for key, shape in layer.items()}
    expected |= {"fc.weight": (D, 3 * D), "hidden_norm.weight": (D,), "norm.weight": (D,)}
    expected |= {f"candidate_selector.{key}_codebook": (vocab, rank) for key in ("predecessor", "successor")}
    expected["candidate_selector.hidden_projection.weight"] = (rank, D)
    assert {key: value.shape for key, value in load_file(tmp_path / "model.safetensors").items()} == expected


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "qwen3_5_moe"])
def test_fused_and_separate_experts_load_to_the_same(tmp_path, name):
    model = target_folder(tmp_path, name)
    stored = load_file(tmp_path / "model.safetensors")
    fused = any(key.endswith("experts.gate_up_proj") for key in stored)
    assert fused == (name == "qwen3_5_moe")  # as published
    change(tmp_path, split_experts if fused else fuse_experts)
    assert_same(load_target(tmp_path)[1], model)


def split_experts(tensors):
    out = {}
    for key, value in tensors.items():
        if key.endswith("experts.gate_up_proj"):
            base = key.removesuffix("gate_up_proj")
            for e, rows in enumerate(value):
                out[f"{base}{e}.gate_proj.weight"], out[f"{base}{e}.up_proj.weight"] = np.split(rows, 2)
        elif key.endswith("experts.down_proj"):
            base = key.removesuffix("down_proj")
            out |= {f"{base}{e}.down_proj.weight": rows for e, rows in enumerate(value)}
        else:
            out[key] = value
    return out


def fuse_experts(tensors):
    out = {key: value for key, value in tensors.items() if not re.search(r"experts\.\d", key)}
    for base in {key.split("experts.")[0] + "experts." for key in tensors if "experts.0." in key}:

        def stack(name, base=base):
            return np.stack([tensors[f"{base}{e}.{name}_proj.weight"] for e in range(3)])

        out[base + "gate_up_proj"] = np.concatenate([stack("gate"), stack("up")], 1)
        out[base + "down_proj"] = stack("down")
    return out


def test_a_vision_language_checkpoint_gives_its_text_model(tmp_path):
    model = target_folder(tmp_path, "qwen3_5_moe")

    def wrap(tensors):
        wrapped = {key.replace("model.", "model.language_model.", 1): value for key, value in tensors.items()}
        extra = ("model.visual.blocks.0.attn.qkv.weight", "mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight")
        return wrapped | {key: np.ones((2, 2), np.float32) for key in extra}

    change(tmp_path, wrap)
    change_config(
        tmp_path, lambda text: {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {"depth": 2}}
    )
    config, loaded = load_target(tmp_path)
    assert config == model.config
    assert_same(loaded, model)


def test_a_target_without_prefix(tmp_path):
    model = target_folder(tmp_path, "llama")
    change(tmp_path, lambda tensors: {key.removeprefix("model."): value for key, value in tensors.items()})
    assert_same(load_target(tmp_path)[1], model)


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    model = target_folder(tmp_path, "llama_tied")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert model.lm_head is None
    change(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert_same(load_target(tmp_path)[1], model)


def test_gated_delta_columns_go_to_their_heads(tmp_path):
    """Straight from the definition: qwen3_5's flat rows and qwen3_next's grouped rows are the same numbers."""
    Hk, Dk, r, Dv = 2, 8, 2, 6
    flat = {n: np.random.default_rng(i).normal(size=(Hk, rows, 32)) for i, (n, rows) in enumerate(
        {"q": Dk, "k": Dk, "v": r * Dv, "z": r * Dv, "b": r, "a": r}.items()
    )}  # fmt: skip
    rows = {n: value.reshape(-1, 32) for n, value in flat.items()}
    grouped = {
        "qwen3_5_moe": {
            "in_proj_qkv": np.concatenate([rows["q"], rows["k"], rows["v"]]),
            "in_proj_z": rows["z"], "in_proj_b": rows["b"], "in_proj_a": rows["a"],
        },
        "qwen3_next": {
            "in_proj_qkvz": np.concatenate([flat[n] for n in "qkvz"], 1).reshape(-1, 32),
            "in_proj_ba": np.concatenate([flat["b"], flat["a"]], 1).reshape(-1, 32),
        },
    }  # fmt: skip
    expected = np.concatenate([flat[n] for n in "qkvzba"], 1).reshape(-1, 32).T.astype(np.float32)
    for name, tensors in grouped.items():
        folder = tmp_path / name
        target_folder(folder, name)
        key = "model.layers.1.linear_attn."
        new = {f"{key}{n}.weight": value.astype(np.float32) for n, value in tensors.items()}
        change(folder, lambda old, new=new: old | new)
        np.testing.assert_array_equal(leaves(load_target(folder)[1])["layers/1/mixer/in_proj/kernel"], expected)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("asked", [None, "bfloat16", "float32"])
def test_dtypes(tmp_path, stored, asked):
    """The CPU computes in float32 unless asked; A_log and dt_bias stay in float32 in the model and in the file."""
    model = target_folder(tmp_path, "qwen3_next", dtype=jnp.dtype(stored))
    tensors = load_file(tmp_path / "model.safetensors")
    assert {str(v.dtype) for k, v in tensors.items() if not k.endswith(("A_log", "dt_bias"))} == {stored}
    assert {str(v.dtype) for k, v in tensors.items() if k.endswith(("A_log", "dt_bias"))} == {"float32"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == stored
    loaded = leaves(load_target(tmp_path, asked and jnp.dtype(asked))[1])
    for path, leaf in leaves(model).items():
        wide = path.endswith(("A_log", "dt_bias"))
        expected = leaf if wide else leaf.astype(stored).astype(asked or "float32")
        assert loaded[path].dtype == expected.dtype, path
        np.testing.assert_array_equal(loaded[path], expected, err_msg=path)


def test_accelerators_keep_the_dtype_of_the_checkpoint(tmp_path, monkeypatch):
    target_folder(tmp_path, "llama", dtype=jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert {leaf.dtype for leaf in leaves(load_target(tmp_path)[1]).values()} == {jnp.dtype(jnp.bfloat16)}


def test_several_files_with_an_index(tmp_path):
    model = target_folder(tmp_path, "qwen3_moe", shard_bytes=20_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    stored = {name: load_file(tmp_path / name) for name in shards}
    assert index["weight_map"] == {key: name for name, tensors in stored.items() for key in tensors}
    assert index["metadata"]["total_size"] == sum(v.nbytes for tensors in stored.values() for v in tensors.values())
    sizes = [sum(v.nbytes for v in tensors.values()) for tensors in stored.values()]
    assert all(size <= 20_000 or len(tensors) == 1 for size, tensors in zip(sizes, stored.values(), strict=True))
    assert_same(load_target(tmp_path)[1], model)


def test_saving_again_leaves_no_files_of_the_checkpoint_before(tmp_path):
    target_folder(tmp_path, "llama", shard_bytes=20_000)
    model = target("qwen3_moe")
    save_target(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_target(tmp_path)[1], model)
