"""What a model is made of, as frozen dataclasses: the target's and the drafter's configuration.

`from_dict` reads a checkpoint's config.json and `to_dict` writes one back; the reading itself, with all the layouts
that are in use, is in `dflash_jax.checkpoints.target_json` and `drafter_json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dflash_jax.errors import InputError

RopeKind = Literal["default", "llama3", "yarn", "linear"]
LayerType = Literal["full_attention", "sliding_attention", "linear_attention"]
NormKind = Literal["plain", "zero_centred", "fp32_scale"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `dim` is how many of a head's dimensions rotate, the first ones; the others pass through."""

    theta: float
    dim: int
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0  # yarn's mscale pair counts only when both are set; 0 means not set
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None  # yarn's factor on cos and sin; None: the formula
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True)
class MoeConfig:
    """Routed experts. `shared_intermediate_size` is 0 when no expert sees every token."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    norm_topk: bool = True
    softmax_after_topk: bool = False  # gpt_oss: softmax over the chosen logits only
    bias: bool = False  # gpt_oss: on the router and on the experts
    swiglu_limit: float | None = None  # gpt_oss: clamped SwiGLU with gain 1.702

    @property
    def dense(self) -> bool:
        """Whether there are so few experts that all of them for every row cost less than picking."""
        return self.num_experts <= 4 * self.top_k


@dataclass(frozen=True)
class GatedDeltaConfig:
    """A linear attention layer: each key head serves `num_v_heads // num_k_heads` value heads."""

    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv_kernel: int = 4


@dataclass(frozen=True)
class TargetConfig:
    """A target model. `family` is the text model's type, one of `target_json.FAMILIES`."""

    family: str
    vocab_size: int
    hidden_size: int
    layer_types: tuple[LayerType, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    gated_attention: bool = False
    sinks: bool = False
    sliding_window: int | None = None  # a query sees the last `sliding_window` keys, itself included
    norm: NormKind = "plain"
    rms_norm_eps: float = 1e-6
    intermediate_size: int = 0
    mlp_bias: bool = False
    moe: MoeConfig | None = None
    dense_layers: tuple[int, ...] = ()  # layers that keep a dense MLP although `moe` is set
    gated_delta: GatedDeltaConfig | None = None
    tie_word_embeddings: bool = False
    max_position: int = 0
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layer_types)

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts."""
        return self.moe is not None and layer not in self.dense_layers

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TargetConfig":
        """From the contents of a target's config.json; a vision-language wrapper gives its text model.

        Raises:
            InputError: an unsupported architecture, a missing or impossible value, or a key that is not understood.
        """
        from dflash_jax.checkpoints.target_json import target_from_dict

        return target_from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers reads as the same text model."""
        from dflash_jax.checkpoints.target_json import target_to_dict

        return target_to_dict(self)


@dataclass(frozen=True)
class DrafterConfig:
    """A DFlash or DFlash 2 drafter. Tap id i is the residual stream after target layer i."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    layer_types: tuple[LayerType, ...]
    causal: tuple[bool, ...]  # per layer: whether the block's rows see only earlier rows of the block
    rope: RopeConfig
    block_size: int
    mask_token_id: int
    tap_ids: tuple[int, ...]
    num_target_layers: int
    attention_bias: bool = False
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-6
    max_position: int = 0
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    conv_kernel_size: int = 0  # DFlash 2: 2
    conv_group_size: int = 16
    selector_rank: int = 0
    selector_top_k: int = 16
    mask_embedding: bool = False  # whether the mask token has an embedding of the drafter's own; a file beside says

    @property
    def is_dflash2(self) -> bool:
        """Whether the drafter has DFlash 2's convolutions or selector."""
        return self.conv_kernel_size > 0 or self.selector_rank > 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DrafterConfig":
        """From the contents of a drafter's config.json, in any of the published layouts.

        Raises:
            InputError: not a drafter, a missing or impossible value, or a key that is not understood.
        """
        from dflash_jax.checkpoints.drafter_json import drafter_from_dict

        return drafter_from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """A config.json in the published layout, which other DFlash loaders read."""
        from dflash_jax.checkpoints.drafter_json import drafter_to_dict

        return drafter_to_dict(self)


def load_config(folder: str | Path) -> dict[str, Any]:
    """The contents of `folder`/config.json; stop tokens of a generation_config.json beside it replace the config's own.

    Raises:
        InputError: no folder, no config.json, or not JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder that holds config.json and the safetensors files")
    values = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        stop = read_json(generation).get("eos_token_id")
        if stop is not None:
            values["eos_token_id"] = stop
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. InputError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}; give the folder of a Hugging Face checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); download the file again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, a JSON object is needed; download the file again")
    return values
