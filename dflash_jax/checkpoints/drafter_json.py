"""config.json of drafters: every published layout in, one layout out that the other loaders read."""

from typing import Any

from dflash_jax.checkpoints.reader import Reader
from dflash_jax.checkpoints.rope_json import read_rope, write_rope
from dflash_jax.config import DrafterConfig, LayerType

_ARCHITECTURES = ("DFlashDraftModel", "DFlash2DraftModel")
_MODEL_TYPES = ("qwen3", "gpt_oss", "llama")  # they share one computation; only the default of rope_theta differs
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Read from dflash_config first, then from the top level.
_EITHER_PLACE = (
    *("block_size", "mask_token_id", "target_layer_ids", "num_target_layers"),
    *("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
    *("input_embedding_scale", "output_multiplier", "final_logit_softcapping"),
)


def drafter_from_dict(values: dict[str, Any]) -> DrafterConfig:
    """See `DrafterConfig.from_dict`."""
    top = Reader(values, "config.json of the drafter")
    nested = Reader(top.mapping("dflash_config"), "dflash_config of the drafter's config.json")
    settings = _merge(top, nested)
    dflash2 = _check_architecture(top)
    layers, heads = top.integer("num_hidden_layers"), top.integer("num_attention_heads")
    head_dim = top.integer("head_dim", top.integer("hidden_size") // heads)
    max_position = top.integer("max_position_embeddings", 2048)
    layer_types, window = _read_layers(top, layers)
    target_layers, taps = _read_taps(settings, layers)
    softcap = settings.number("final_logit_softcapping", 0.0)
    config = DrafterConfig(
        vocab_size=top.integer("vocab_size"),
        hidden_size=top.integer("hidden_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=top.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=top.integer("intermediate_size"),
        layer_types=layer_types,
        causal=_read_causal(top, nested, layer_types),
        rope=read_rope(
            top, head_dim, max_position, 150000.0 if values.get("model_type") == "gpt_oss" else 10000.0, 1.0
        ),
        block_size=settings.integer("block_size", at_least=2),
        mask_token_id=settings.integer("mask_token_id", at_least=0),
        tap_ids=taps,
        num_target_layers=target_layers,
        attention_bias=top.boolean("attention_bias", values.get("model_type") == "gpt_oss"),
        sliding_window=window,
        rms_norm_eps=top.number("rms_norm_eps", 1e-5 if values.get("model_type") == "gpt_oss" else 1e-6),
        max_position=max_position,
        input_embedding_scale=settings.number("input_embedding_scale", 1.0),
        output_multiplier=settings.number("output_multiplier", 1.0),
        final_logit_softcapping=softcap or None,
        conv_kernel_size=settings.integer("conv_kernel_size", 2 if dflash2 else 0, at_least=0),
        conv_group_size=settings.integer("conv_group_size", 16),
        selector_rank=settings.integer("selector_rank", 256 if dflash2 else 0, at_least=0),
        selector_top_k=settings.integer("selector_top_k", 16),
    )
    top.get("tie_word_embeddings", None)  # a drafter borrows the target's embedding and head, tied or not
    top.finish()
    nested.finish("dflash_config.")
    _check(top, config)
    return config


def _merge(top: Reader, nested: Reader) -> Reader:
    """The settings that may stand in either place. The same key twice must say the same."""
    merged = {}
    for key in _EITHER_PLACE:
        outer, inner = top.get(key, None), nested.get(key, None)
        if None not in (outer, inner) and outer != inner:
            raise top.error(f"{key} is {outer!r} at the top level and {inner!r} in dflash_config, keep one of them")
        merged[key] = outer if inner is None else inner
    return Reader(merged, "config.json of the drafter")


def _check_architecture(top: Reader) -> bool:
    """Whether this is a DFlash 2 drafter."""
    names = top.get("architectures", list(_ARCHITECTURES[:1]))
    known = [name for name in names if name in _ARCHITECTURES]
    if not known:
        raise top.error(f"architectures {names} is not a drafter, supported are {', '.join(_ARCHITECTURES)}")
    model_type = top.get("model_type", "qwen3")
    if model_type not in _MODEL_TYPES:
        raise top.error(
            f"model_type {model_type!r} is not supported for a drafter, supported are {', '.join(_MODEL_TYPES)}"
        )
    return known[0] == "DFlash2DraftModel"


def _read_layers(top: Reader, count: int) -> tuple[tuple[LayerType, ...], int | None]:
    """`layer_types` rules, else use_sliding_window with max_window_layers, else every layer is full.

    A sliding layer keeps its window whatever use_sliding_window says: published drafters lose acceptance without it.
    """
    window, used = top.get("sliding_window", None), top.boolean("use_sliding_window", False)
    first = top.integer("max_window_layers", 28, at_least=0)
    types = tuple(
        top.get(
            "layer_types",
            ["sliding_attention" if used and window and i >= first else "full_attention" for i in range(count)],
        )
    )
    if len(types) != count or set(types) - set(_LAYER_TYPES):
        raise top.error(f"layer_types is {list(types)}, {count} entries of {' or '.join(_LAYER_TYPES)} are needed")
    if "sliding_attention" not in types:
        return types, None
    return types, top.integer("sliding_window")


def _read_causal(top: Reader, nested: Reader, layer_types: tuple[str, ...]) -> tuple[bool, ...]:
    inner = nested.get("causal", None)
    forced = top.get("is_causal", inner)
    if forced not in (None, True, False):
        raise top.error(f"is_causal is {forced!r}, true or false is needed")
    return tuple(kind == "sliding_attention" if forced is None else bool(forced) for kind in layer_types)


def _read_taps(settings: Reader, layers: int) -> tuple[int, tuple[int, ...]]:
    """The number of target layers (0: not said) and the tapped ones."""
    target_layers = settings.integer("num_target_layers", 0 if "target_layer_ids" in settings else None, at_least=0)
    taps = settings.integers("target_layer_ids", default_tap_ids(target_layers, layers))
    if not taps or (target_layers and max(taps) >= target_layers):
        raise settings.error(f"target_layer_ids {list(taps)} must lie in 0 to {target_layers - 1}, the target's layers")
    return target_layers, taps


def default_tap_ids(target_layers: int, layers: int) -> tuple[int, ...]:
    """Evenly spread over the target, from layer 1 to three before the end; one layer taps the middle."""
    if layers == 1:
        return (target_layers // 2,)
    return tuple(round(1 + i * (target_layers - 4) / (layers - 1)) for i in range(layers))


def _check(top: Reader, config: DrafterConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise top.error(
            f"num_attention_heads {config.num_heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if config.mask_token_id >= config.vocab_size:
        raise top.error(f"mask_token_id {config.mask_token_id} is outside the vocabulary of {config.vocab_size}")
    if config.conv_kernel_size not in (0, 2):
        raise top.error(f"conv_kernel_size is {config.conv_kernel_size}, only 2 (or 0 for none) is supported")
    if config.conv_kernel_size and config.hidden_size % config.conv_group_size:
        raise top.error(
            f"hidden_size {config.hidden_size} is not a multiple of conv_group_size {config.conv_group_size}"
        )


def drafter_to_dict(config: DrafterConfig) -> dict[str, Any]:
    """See `DrafterConfig.to_dict`. block_size and num_target_layers go to the top level, where every loader looks."""
    dflash: dict[str, Any] = {"mask_token_id": config.mask_token_id, "target_layer_ids": list(config.tap_ids)}
    if config.is_dflash2:
        for key in ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"):
            dflash[key] = getattr(config, key)
    for key, neutral in (("input_embedding_scale", 1.0), ("output_multiplier", 1.0), ("final_logit_softcapping", None)):
        if getattr(config, key) != neutral:
            dflash[key] = getattr(config, key)
    values = {
        "architectures": [_ARCHITECTURES[config.is_dflash2]],
        "model_type": "qwen3",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "block_size": config.block_size,
        "dflash_config": dflash,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_types": list(config.layer_types),
        "max_position_embeddings": config.max_position,
        "max_window_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_target_layers": config.num_target_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": write_rope(config.rope, config.head_dim),
        "rope_theta": config.rope.theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": False,
        "use_sliding_window": config.sliding_window is not None,
        "vocab_size": config.vocab_size,
    }
    return values | _write_causal(config)


def _write_causal(config: DrafterConfig) -> dict[str, Any]:
    if config.causal == tuple(kind == "sliding_attention" for kind in config.layer_types):
        return {}
    if len(set(config.causal)) > 1:
        raise ValueError(f"causal {config.causal} differs between layers of one type, which config.json cannot say")
    return {"is_causal": config.causal[0]}
