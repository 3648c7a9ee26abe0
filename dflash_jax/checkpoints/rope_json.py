"""Rotary embedding settings in config.json: `rope_theta` with `rope_scaling`, or everything in `rope_parameters`."""

import math
from typing import Any

from dflash_jax.checkpoints.reader import Reader
from dflash_jax.config import RopeConfig

_KINDS = ("default", "llama3", "yarn", "linear")
# For text all three position rows of multimodal rope are equal, which makes it plain rope.
_TEXT_HARMLESS = ("mrope_section", "mrope_interleaved")


def read_rope(
    top: Reader, head_dim: int, max_position: int, default_theta: float, default_partial: float
) -> RopeConfig:
    """Return the rope of a model whose config.json is `top`.

    As in transformers 5, `rope_scaling` replaces `rope_parameters` where both are given, and values in either win over
    the older top-level ones. A value that is lost in this way is refused.
    """
    parameters, scaling = top.mapping("rope_parameters"), top.mapping("rope_scaling")
    name = "rope_scaling" if scaling else "rope_parameters"
    rope = Reader(scaling or parameters, f"{name} of config.json")
    old_theta, old_partial = (
        top.number("rope_theta", default_theta),
        top.number("partial_rotary_factor", default_partial),
    )
    old_original = top.get("original_max_position_embeddings", None)
    for key in _TEXT_HARMLESS:
        rope.get(key, None)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KINDS:
        raise rope.error(f"rope_type is {kind!r}, supported are {', '.join(_KINDS)}")
    theta = rope.number("rope_theta", old_theta)
    dim = int(head_dim * rope.number("partial_rotary_factor", old_partial))
    original = rope.get("original_max_position_embeddings", None) or max_position
    used = {"rope_theta": theta, "partial_rotary_factor": dim / head_dim}
    for key, value in used.items() if scaling else ():
        if parameters.get(key, value) != value:
            raise rope.error(
                f"{key} {value} counts, and rope_parameters says {parameters[key]}; write the right one there"
            )
    if kind in ("llama3", "yarn") and old_original not in (None, original):
        raise rope.error(
            f"original_max_position_embeddings {original} counts, and the top level says {old_original}; "
            f"write the right one into {name}"
        )
    config = RopeConfig(theta=theta, dim=dim, **_scaling_values(rope, kind, int(original), max_position))
    rope.finish()
    if not 0 < dim <= head_dim or dim % 2:
        raise rope.error(
            f"partial_rotary_factor rotates {dim} of {head_dim} dimensions, "
            f"an even number of at most {head_dim} is needed"
        )
    return config


def _scaling_values(rope: Reader, kind: str, original: int, max_position: int) -> dict[str, Any]:
    if kind == "default":
        rope.get("factor", None)
        return {}
    if kind == "linear":
        return {"kind": "linear", "factor": rope.number("factor")}
    if kind == "llama3":
        bands = {key: rope.number(key) for key in ("low_freq_factor", "high_freq_factor")}
        return {"kind": "llama3", "factor": rope.number("factor"), "original_max_position": original, **bands}
    optional = {
        key: value for key in ("mscale", "mscale_all_dim", "attention_factor") if (value := rope.number(key, 0.0))
    }
    return {
        "kind": "yarn",
        "factor": rope.number("factor", max_position / original),
        "original_max_position": original,
        "beta_fast": rope.number("beta_fast", 32.0) or 32.0,
        "beta_slow": rope.number("beta_slow", 1.0) or 1.0,
        "truncate": rope.boolean("truncate", True),
        **optional,
    }


def write_rope(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """The `rope_parameters` object of `rope`."""
    values: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.dim != head_dim:
        fraction = rope.dim / head_dim
        exact = int(head_dim * fraction) == rope.dim  # readers truncate the product
        values["partial_rotary_factor"] = fraction if exact else math.nextafter(fraction, 1.0)
    if rope.kind != "default":
        values["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        for key in ("mscale", "mscale_all_dim", "attention_factor"):
            if getattr(rope, key):
                values[key] = getattr(rope, key)
    return values
