"""A checkpoint that cannot work is refused in one line that names the tensor, what was expected and what was found."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.checkpoints import load_drafter, load_target, save_target
from dflash_jax.errors import InputError
from tests.checkpoints.folders import change, change_config, drafter_folder, target, target_folder

Q = "model.layers.1.self_attn.q_proj.weight"


def refuses(folder, message, load=load_target):
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_missing_tensors(tmp_path):
    target_folder(tmp_path, "llama")
    change(tmp_path, lambda t: {k: v for k, v in t.items() if k != Q})
    refuses(
        tmp_path, r"missing tensor layers.1.self_attn.q_proj.weight, expected with shape \[32, 32\]; found 38 tensors"
    )
    change(tmp_path, lambda t: {k: v for k, v in t.items() if "layers.2" not in k})
    refuses(tmp_path, r"missing tensor .* \(and 9 more\)")


def test_a_misshapen_tensor(tmp_path):
    target_folder(tmp_path, "llama")
    change(tmp_path, lambda t: t | {Q: np.zeros((24, 32), np.float32)})
    refuses(
        tmp_path, r"tensor layers.1.self_attn.q_proj.weight has shape \[24, 32\], expected \[32, 32\] by config.json"
    )


def test_a_tensor_that_has_no_place(tmp_path):
    target_folder(tmp_path, "llama")
    change(tmp_path, lambda t: t | {"model.layers.1.self_attn.q_norm.weight": np.ones(8, np.float32)})
    refuses(tmp_path, "no place for: layers.1.self_attn.q_norm.weight; take the config.json")


def test_a_file_that_is_cut_short(tmp_path):
    target_folder(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    size, content = path.stat().st_size, path.read_bytes()
    path.write_bytes(content[:-100])
    refuses(tmp_path, f"model.safetensors is cut short: {size - 100} bytes of {size}")
    path.write_bytes(content[:200])
    refuses(tmp_path, r"model.safetensors is cut short or not safetensors \(200 bytes\)")
    path.write_bytes(b"")
    refuses(tmp_path, r"cut short or not safetensors \(0 bytes\)")
    path.write_bytes((8).to_bytes(8, "little") + b"notjson!" + content)
    refuses(tmp_path, "no valid safetensors header")


def test_a_folder_without_weights(tmp_path):
    target_folder(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    refuses(tmp_path, "neither model.safetensors nor model.safetensors.index.json; found no weight files")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refuses(tmp_path, "found pytorch_model.bin, convert them first")


def test_shards_that_do_not_fit_their_index(tmp_path):
    target_folder(tmp_path, "llama", shard_bytes=40_000)
    index = tmp_path / "model.safetensors.index.json"
    first = json.loads(index.read_text())
    second = dict(first, weight_map=first["weight_map"] | {"model.layers.9.x": "model-00001-of-00004.safetensors"})
    shards = sorted(tmp_path.glob("*.safetensors"))
    second["weight_map"]["model.layers.9.x"] = shards[0].name
    index.write_text(json.dumps(second))
    refuses(tmp_path, f"{shards[0].name} does not hold model.layers.9.x")
    index.write_text(json.dumps(first))
    shards[1].unlink()
    refuses(tmp_path, f"lacks the shard {shards[1].name}")
    index.write_text("{}")
    refuses(tmp_path, "not a safetensors index with a weight_map")


def test_float8_weights(tmp_path):
    target_folder(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[Q]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    refuses(
        tmp_path, "q_proj.weight has dtype F8_E4M3, accepted are BF16, F16, F32, F64; use the unquantised checkpoint"
    )


def test_two_layouts_of_the_same_experts(tmp_path):
    target_folder(tmp_path, "qwen3_5_moe")
    extra = {"model.layers.0.mlp.experts.0.gate_proj.weight": np.zeros((12, 32), np.float32)}
    change(tmp_path, lambda t: t | extra)
    refuses(tmp_path, "layers.0.mlp.experts.gate_up_proj and layers.0.mlp.experts.0.gate_proj.weight are two layouts")


def test_a_drafter_and_a_target_in_the_wrong_place(tmp_path):
    drafter_folder(tmp_path / "drafter", "dflash")
    target_folder(tmp_path / "target", "llama")
    refuses(tmp_path / "drafter", "that of a DFlash drafter, a target is needed")
    refuses(tmp_path / "target", "is not a drafter, supported are DFlashDraftModel", load_drafter)


def test_weights_of_another_model(tmp_path):
    drafter_folder(tmp_path, "dflash")
    change(tmp_path, lambda t: {f"draft.{k}": v for k, v in t.items()})
    refuses(
        tmp_path,
        "missing tensor fc.weight, accepted names are fc.weight, model.fc.weight; found draft.fc.weight",
        load_drafter,
    )


def test_a_drafter_with_other_taps_than_its_config_says(tmp_path):
    drafter_folder(tmp_path, "dflash")
    taps = {"mask_token_id": 3, "target_layer_ids": [1, 5]}
    change_config(tmp_path, lambda c: c | {"dflash_config": taps})
    refuses(tmp_path, r"fc.weight has shape \[32, 96\], expected \[32, 64\]", load_drafter)


def test_a_dtype_that_is_not_written(tmp_path):
    with pytest.raises(InputError, match="not written in int8; give bfloat16, float16 or float32"):
        save_target(target("llama"), tmp_path, jnp.int8)
