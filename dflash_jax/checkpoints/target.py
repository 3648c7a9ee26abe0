"""Loading and saving a target."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.checkpoints.fill import default_dtype, fill, without_prefix
from dflash_jax.checkpoints.safetensors_file import Stored, open_folder
from dflash_jax.checkpoints.target_table import PREFIXES, target_table
from dflash_jax.checkpoints.write import SHARD_BYTES, write
from dflash_jax.config import TargetConfig, load_config
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target

_PART = 2**22  # elements that are compared at a time


def load_target(
    folder: str | Path, dtype: jnp.dtype | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[TargetConfig, Target]:
    """A target from a Hugging Face folder: config.json and safetensors, sharded or not.

    Args:
        dtype: of the weights; by default float32 on the CPU and the checkpoint's own dtype on accelerators.
        mesh: where the weights go, each device its own part (see `dflash_jax.sharding`); by default the default device.

    Raises:
        InputError: a configuration or weights that are not those of a supported target; the message names the key.
            Or a mesh that does not divide the model.
    """
    folder = Path(folder)
    config = TargetConfig.from_dict(load_config(folder))
    tensors = without_prefix(folder, open_folder(folder), PREFIXES, "embed_tokens.weight")
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        if _same(tensors["lm_head.weight"], tensors["embed_tokens.weight"]):
            del tensors["lm_head.weight"]  # a copy, which some writers store
        else:  # merged and fine-tuned models have a head of their own, whatever config.json says
            config = replace(config, tie_word_embeddings=False)
    dtype = default_dtype(dtype, tensors["embed_tokens.weight"])
    model = shapes_of(lambda rngs: Target(config, dtype=dtype, rngs=rngs))
    return config, fill(folder, model, target_table(config), tensors, mesh)


def _same(one: Stored, other: Stored) -> bool:
    """Return whether two tensors hold the same values; reads no further than to the first that differ."""
    count = math.prod(one.shape)
    parts = ((first, min(_PART, count - first)) for first in range(0, count, _PART))
    return one.shape == other.shape and all(np.array_equal(one.read(*part), other.read(*part)) for part in parts)


def save_target(
    target: Target, folder: str | Path, dtype: jnp.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a target in the layout that transformers loads.

    Args:
        dtype: of the weights, by default the model's own; leaves that stay float32 in any model (A_log, dt_bias) do so.
        shard_bytes: a larger model is written as several files with an index.

    Raises:
        InputError: a dtype other than bfloat16, float16 or float32.
    """
    dtype = target.embed.embedding.dtype if dtype is None else dtype
    write(target, folder, target.config.to_dict(), target_table(target.config), "model.", dtype, shard_bytes)
