"""Small random checkpoints without torch, and how to change their tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from dflash_jax.checkpoints import save_drafter, save_target
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target

_BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "shared_expert_intermediate_size": 20,
}
TARGETS = {
    "llama": _BASE | {"model_type": "llama"},
    "llama_tied": _BASE | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3_moe": _BASE | _EXPERTS | {"model_type": "qwen3_moe"},
    "qwen3_next": _BASE | _EXPERTS | _DELTA | {"model_type": "qwen3_next"},
    "qwen3_5_moe": _BASE | _EXPERTS | _DELTA | {"model_type": "qwen3_5_moe_text"},
    "gpt_oss": _BASE | {"model_type": "gpt_oss", "sliding_window": 8, "num_local_experts": 3, "num_experts_per_tok": 2},
}
DRAFTER = _BASE | {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "block_size": 4,
    "num_target_layers": 8,
    "num_hidden_layers": 2,
    "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 3, 5]},
}
DRAFTERS = {
    "dflash": DRAFTER,
    "biased": DRAFTER | {"attention_bias": True},
    "dflash2": DRAFTER | {"architectures": ["DFlash2DraftModel"], "selector_rank": 5},
}


def random_leaves(build: Callable[[], nnx.Module], seed: int = 0) -> nnx.Module:
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype), state))


def target(name: str, **options) -> Target:
    config = TargetConfig.from_dict(TARGETS[name] | options)
    return random_leaves(lambda: Target(config, rngs=nnx.Rngs(0)))


def target_folder(folder: Path, name: str, **options) -> Target:
    """A saved random target, and what it holds."""
    model = target(name)
    save_target(model, folder, **options)
    return model


def drafter_folder(folder: Path, name: str, **options) -> Drafter:
    model = random_leaves(lambda: Drafter(DrafterConfig.from_dict(DRAFTERS[name]), rngs=nnx.Rngs(0)))
    save_drafter(model, folder, **options)
    return model


def leaves(model: nnx.Module) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(model: nnx.Module, expected: nnx.Module) -> None:
    found, wanted = leaves(model), leaves(expected)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def change(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray] | None]) -> None:
    """Rewrite the tensors of a folder that holds one file."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "model.safetensors")


def change_config(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
