"""Small random pairs of every target family, with a vocabulary so small that a drafter's guesses are often right."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from dflash_jax.pair import Pair
from dflash_jax.text import Tokenizer
from tests import weights

VOCAB, BLOCK = 6, 4
# Weights with which the greedy text is varied: most random models of this size say one token for ever.
SEEDS = {"llama": 11, "qwen3": 13, "qwen2": 9, "qwen3_moe": 11, "gpt_oss": 10}
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
_WINDOWED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_HYBRID = _BASE | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_SHARED = _EXPERTS | {"shared_expert_intermediate_size": 16}
TARGETS = {
    "qwen3_5_moe": _HYBRID | _SHARED | {"model_type": "qwen3_5_moe_text"},
    "qwen3_5": _HYBRID | {"model_type": "qwen3_5_text"},
    "qwen3_next": _HYBRID | _SHARED | {"model_type": "qwen3_next"},
    "qwen3_moe": _BASE | _EXPERTS | {"model_type": "qwen3_moe"},
    "qwen3": _BASE | {"model_type": "qwen3"},
    "llama": _BASE | {"model_type": "llama"},
    "qwen2": _BASE | _WINDOWED | {"model_type": "qwen2", "use_sliding_window": True},
    "gpt_oss": _BASE | _WINDOWED | {"model_type": "gpt_oss", "num_local_experts": 5, "num_experts_per_tok": 2},
}
_DFLASH = _BASE | {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "block_size": BLOCK,
    "num_target_layers": 3,
    "num_hidden_layers": 2,
    "sliding_window": 6,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "dflash_config": {"mask_token_id": VOCAB - 1, "target_layer_ids": [0, 2]},
}
DRAFTERS = {
    "dflash": _DFLASH,
    "dflash2": _DFLASH
    | {"architectures": ["DFlash2DraftModel"], "conv_kernel_size": 2, "selector_rank": 4, "selector_top_k": 3},
}


@cache
def pair(family: str, drafter: str | None = "dflash", *, sharpness: float = 6.0, drafter_positions: int = 512) -> Pair:
    """A random pair. `sharpness` is the scale of the head: at 6 greedy margins are far above rounding."""
    target = make_target(TARGETS[family], SEEDS.get(family, 1))
    head, embedding = target.lm_head.kernel, target.embed.embedding[...]
    # Partial to counting up, against varied text ending in one token for ever.
    head[...] = sharpness * (head[...] + 4 * (jnp.roll(embedding, 1, axis=0) - embedding).T / embedding.shape[1])
    positions = {"max_position_embeddings": drafter_positions}
    model = None if drafter is None else make_drafter(DRAFTERS[drafter] | positions)
    return Pair(target, model, Tokenizer(None, Path("tests"), VOCAB))


def make_target(config: dict, seed: int = 1) -> Target:
    return _randomised(lambda: Target(TargetConfig.from_dict(config), rngs=nnx.Rngs(0)), seed)


def make_drafter(config: dict) -> Drafter:
    return _randomised(lambda: Drafter(DrafterConfig.from_dict(config), rngs=nnx.Rngs(0)), 2)


def _randomised(build: Callable[[], nnx.Module], seed: int) -> Any:
    """Every weight at random, none left at its neutral start: norms, biases, sinks and decay rates too."""
    rng = np.random.default_rng(seed)

    def leaf(names: tuple[str, ...], start: np.ndarray) -> np.ndarray:
        noise = rng.normal(size=start.shape)
        if names[-1] == "A_log":
            return 0.5 * noise
        if start.ndim == 1 or "base" in names:
            return start + 0.3 * noise
        if {"embed", "predecessor", "successor"}.intersection(names):
            return noise
        return (2.0 if "q_proj" in names else 1.0) * noise / math.sqrt(start.shape[-2])

    return weights.made(build, leaf)


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]
