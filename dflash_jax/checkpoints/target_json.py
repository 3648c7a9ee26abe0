"""config.json of targets, to `TargetConfig` and back.

Both styles of transformers are read: version 4 (`rope_theta`, `rope_scaling`) and version 5 (`rope_parameters`).
Written is version 5.
"""

from dataclasses import dataclass
from typing import Any

from dflash_jax.checkpoints.reader import Reader, is_harmless
from dflash_jax.checkpoints.rope_json import read_rope, write_rope
from dflash_jax.config import GatedDeltaConfig, LayerType, MoeConfig, NormKind, TargetConfig
from dflash_jax.errors import InputError


@dataclass(frozen=True)
class Family:
    """What a family of targets fixes, and the values that transformers assumes where config.json says nothing."""

    model_type: str
    architecture: str
    norm: NormKind = "plain"
    qk_norm: bool = False
    hybrid: bool = False  # gated attention every few layers, gated delta layers between
    sparse: bool = False
    windowed: bool = False
    qkv_bias: bool | None = None  # None: config.json's attention_bias says
    o_bias: bool | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    norm_topk: bool | None = None  # None: config.json's norm_topk_prob says
    norm_topk_default: bool = False


_HYBRID: dict[str, Any] = {"norm": "zero_centred", "qk_norm": True, "hybrid": True, "head_dim": 256}

_WRAPPERS = {"model_type", "architectures", "quantization_config", "tie_word_embeddings", "eos_token_id"}

FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM"),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, o_bias=False, windowed=True),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", qk_norm=True, windowed=True, head_dim=128),
    "qwen3_moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", qk_norm=True, windowed=True, sparse=True),
    "qwen3_next": Family("qwen3_next", "Qwen3NextForCausalLM", **_HYBRID, sparse=True, norm_topk_default=True),
    "qwen3_5": Family("qwen3_5_text", "Qwen3_5ForCausalLM", **_HYBRID),
    "qwen3_5_moe": Family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", **_HYBRID, sparse=True, norm_topk=True),
    "gpt_oss": Family(
        "gpt_oss",
        "GptOssForCausalLM",
        norm="fp32_scale",
        windowed=True,
        sparse=True,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        norm_topk=True,
    ),
}


def target_from_dict(values: dict[str, Any]) -> TargetConfig:
    """See `TargetConfig.from_dict`."""
    family, text = _text_model(values)
    top = Reader(text, "config.json")
    for key in ("model_type", "quantization_config"):
        top.get(key, None)
    _check_quantization(family, text)
    rules = FAMILIES[family]
    hidden, heads = top.integer("hidden_size"), top.integer("num_attention_heads")
    head_dim = top.integer("head_dim", rules.head_dim or hidden // heads)
    max_position = top.integer("max_position_embeddings", 2048)
    bias = top.boolean("attention_bias", family == "gpt_oss")
    layer_types, window = read_layers(top, family)
    moe, dense_layers = _read_moe(top, family, len(layer_types))
    config = TargetConfig(
        family=family,
        vocab_size=top.integer("vocab_size"),
        hidden_size=hidden,
        layer_types=layer_types,
        num_heads=heads,
        num_kv_heads=top.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        rope=read_rope(top, head_dim, max_position, rules.rope_theta, 0.25 if rules.hybrid else 1.0),
        qkv_bias=bias if rules.qkv_bias is None else rules.qkv_bias,
        o_bias=bias if rules.o_bias is None else rules.o_bias,
        qk_norm=rules.qk_norm,
        gated_attention=rules.hybrid,
        sinks=family == "gpt_oss",
        sliding_window=window,
        norm=rules.norm,
        rms_norm_eps=top.number("rms_norm_eps", rules.rms_norm_eps),
        intermediate_size=_read_columns(top, family),
        mlp_bias=top.boolean("mlp_bias", False) if family == "llama" else False,
        moe=moe,
        dense_layers=dense_layers,
        gated_delta=_read_gated_delta(top) if rules.hybrid else None,
        tie_word_embeddings=top.boolean("tie_word_embeddings", False),
        max_position=max_position,
        eos_token_ids=top.integers("eos_token_id", ()),
    )
    top.finish()
    _check_heads(top, config.num_heads, config.num_kv_heads)
    return config


def _text_model(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the family, and the text model's own settings.

    Of a wrapper only `_WRAPPERS` count, and they rule over its text_config's, as in transformers 5. Another one that
    would change the computation is refused where it is not the text model's.
    """
    model_type = values.get("model_type")
    if "dflash_config" in values or any("DFlash" in name for name in values.get("architectures") or ()):
        raise InputError("config.json is that of a DFlash drafter, a target is needed; give the drafter as the drafter")
    family = next((name for name, rules in FAMILIES.items() if model_type in (name, rules.model_type)), None)
    if family is None:
        raise InputError(
            f"config.json: model_type {model_type!r} (architectures {values.get('architectures')}) is not supported; "
            f"supported targets are {', '.join(FAMILIES)}"
        )
    nested = values.get("text_config")
    if nested is None:
        return family, values
    if not isinstance(nested, dict) or nested.get("model_type") not in (None, family, FAMILIES[family].model_type):
        raise InputError(
            f"config.json: text_config of {model_type} is not a {FAMILIES[family].model_type} configuration"
        )
    outer = {key: value for key, value in values.items() if key != "text_config" and value is not None}
    for key in outer.keys() - _WRAPPERS:
        if not is_harmless(key) and outer[key] != nested.get(key):
            raise InputError(
                f"config.json: {key} {outer[key]!r} stands beside text_config, which alone counts and says "
                f"{nested.get(key, 'nothing')!r}; keep it in text_config"
            )
    return family, nested | {key: value for key, value in outer.items() if key in _WRAPPERS}


def _check_quantization(family: str, values: dict[str, Any]) -> None:
    method = (values.get("quantization_config") or {}).get("quant_method")
    if values.get("quantization_config") is None or (family == "gpt_oss" and method == "mxfp4"):
        return
    raise InputError(
        f"config.json: quantization_config with quant_method {method!r} is not supported for {family}; "
        "use a bfloat16, float16 or float32 checkpoint, or MXFP4 for gpt_oss"
    )


def _read_columns(top: Reader, family: str) -> int:
    """The width of dense MLPs. Some qwen3_5_moe files carry one although no layer has a dense MLP."""
    if family == "qwen3_5_moe":
        top.get("intermediate_size", None)
        return 0
    return top.integer("intermediate_size")


def _check_heads(top: Reader, heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise top.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")


def read_layers(top: Reader, family: str) -> tuple[tuple[LayerType, ...], int | None]:
    """Each layer's type and the sliding window, from `layer_types` or from the family's older keys."""
    rules, count = FAMILIES[family], top.integer("num_hidden_layers")
    window = _read_window(top, family)
    interval = top.integer("full_attention_interval", 4) if rules.hybrid else 4
    first_windowed = top.integer("max_window_layers", 28, at_least=0)
    given = top.get("layer_types", None)
    types = tuple(given) if given is not None else _default_layers(family, count, interval, window, first_windowed)
    _check_layers(top, rules, types, count, window)
    return types, window if "sliding_attention" in types else None


def _default_layers(
    family: str, count: int, interval: int, window: int | None, first_windowed: int
) -> tuple[LayerType, ...]:
    """What transformers assumes without `layer_types`."""

    def kind(i: int) -> LayerType:
        if FAMILIES[family].hybrid:
            return "linear_attention" if (i + 1) % interval else "full_attention"
        if family == "gpt_oss":
            return "full_attention" if i % 2 else "sliding_attention"
        # the window of qwen3_moe, when used, holds in every layer
        windowed = window is not None and (family == "qwen3_moe" or i >= first_windowed)
        return "sliding_attention" if windowed else "full_attention"

    return tuple(kind(i) for i in range(count))


def _read_window(top: Reader, family: str) -> int | None:
    rules = FAMILIES[family]
    window = top.integer("sliding_window") if "sliding_window" in top else None
    # gpt_oss has no such switch: its window is always on.
    used = top.boolean("use_sliding_window", family == "gpt_oss")
    if used and not rules.windowed:
        raise top.error(f"use_sliding_window is true, which {family} does not have; set it to false")
    return window if used else None


def _check_layers(top: Reader, rules: Family, types: tuple[str, ...], count: int, window: int | None) -> None:
    accepted = {"full_attention"} | (
        {"linear_attention"} if rules.hybrid else {"sliding_attention"} if window else set()
    )
    wrong = set(types) - accepted
    if wrong:
        raise top.error(
            f"layer_types holds {sorted(wrong)}, accepted here are {sorted(accepted)}; "
            "sliding layers need sliding_window (and use_sliding_window)"
        )
    if len(types) != count:
        raise top.error(f"layer_types has {len(types)} entries for num_hidden_layers {count}, make them equal")


def _read_moe(top: Reader, family: str, layers: int) -> tuple[MoeConfig | None, tuple[int, ...]]:
    """The experts, and the layers that have a dense MLP instead."""
    rules = FAMILIES[family]
    if not rules.sparse:
        return None, ()
    experts = top.either(("num_experts", "num_local_experts"))
    top_k = top.either(("num_experts_per_tok", "experts_per_token"))
    if top_k > experts:
        raise top.error(f"num_experts_per_tok {top_k} is more than the {experts} experts")
    gpt_oss = family == "gpt_oss"
    width = top.integer("intermediate_size" if gpt_oss else "moe_intermediate_size")
    shared = top.integer("shared_expert_intermediate_size", at_least=0) if rules.hybrid else 0
    norm_topk = top.boolean("norm_topk_prob", rules.norm_topk_default) if rules.norm_topk is None else rules.norm_topk
    limit = top.number("swiglu_limit", 7.0) if gpt_oss else None
    step = top.integer("decoder_sparse_step", 1) if rules.norm_topk is None else 1
    listed = top.integers("mlp_only_layers", ()) if not gpt_oss else ()
    dense = tuple(i for i in range(layers) if i in listed or (i + 1) % step)
    return MoeConfig(experts, top_k, width, shared, norm_topk, gpt_oss, gpt_oss, limit), dense


def _read_gated_delta(top: Reader) -> GatedDeltaConfig:
    config = GatedDeltaConfig(
        num_k_heads=top.integer("linear_num_key_heads"),
        num_v_heads=top.integer("linear_num_value_heads"),
        k_head_dim=top.integer("linear_key_head_dim"),
        v_head_dim=top.integer("linear_value_head_dim"),
        conv_kernel=top.integer("linear_conv_kernel_dim", 4),
    )
    if config.num_v_heads % config.num_k_heads:
        raise top.error(
            f"linear_num_value_heads {config.num_v_heads} is not a multiple of "
            f"linear_num_key_heads {config.num_k_heads}"
        )
    return config


def target_to_dict(config: TargetConfig) -> dict[str, Any]:
    """See `TargetConfig.to_dict`."""
    rules = FAMILIES[config.family]
    values: dict[str, Any] = {
        "architectures": [rules.architecture],
        "model_type": rules.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": write_rope(config.rope, config.head_dim),
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": list(config.eos_token_ids) if len(config.eos_token_ids) != 1 else config.eos_token_ids[0],
        "layer_types": list(config.layer_types),
    }
    if not config.eos_token_ids:
        del values["eos_token_id"]
    if config.family == "qwen3_5_moe":
        del values["intermediate_size"]
    return values | _write_attention(config) | _write_moe(config) | _write_gated_delta(config)


def _write_attention(config: TargetConfig) -> dict[str, Any]:
    rules, values = FAMILIES[config.family], {}
    if rules.qkv_bias is None:
        values["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    if rules.windowed:
        values["sliding_window"] = config.sliding_window
    if rules.windowed and config.family != "gpt_oss":
        values["use_sliding_window"] = config.sliding_window is not None
    return values


def _write_moe(config: TargetConfig) -> dict[str, Any]:
    moe, rules = config.moe, FAMILIES[config.family]
    if moe is None:
        return {}
    # transformers 5 maps num_experts to num_local_experts for these two, and saves the latter
    name = "num_local_experts" if config.family in ("gpt_oss", "qwen3_moe") else "num_experts"
    values: dict[str, Any] = {name: moe.num_experts, "num_experts_per_tok": moe.top_k}
    if config.family == "gpt_oss":
        return values | {"swiglu_limit": moe.swiglu_limit}
    values["moe_intermediate_size"] = moe.intermediate_size
    if rules.hybrid:
        values["shared_expert_intermediate_size"] = moe.shared_intermediate_size
    if rules.norm_topk is None:
        values |= {
            "norm_topk_prob": moe.norm_topk,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.dense_layers),
        }
    return values


def _write_gated_delta(config: TargetConfig) -> dict[str, Any]:
    delta = config.gated_delta
    if delta is None:
        return {}
    return {
        "linear_num_key_heads": delta.num_k_heads,
        "linear_num_value_heads": delta.num_v_heads,
        "linear_key_head_dim": delta.k_head_dim,
        "linear_value_head_dim": delta.v_head_dim,
        "linear_conv_kernel_dim": delta.conv_kernel,
    }
