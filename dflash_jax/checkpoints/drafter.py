"""Loading and saving a drafter."""

from pathlib import Path

import jax
import jax.numpy as jnp

from dflash_jax.checkpoints.drafter_table import PREFIXES, drafter_table
from dflash_jax.checkpoints.fill import default_dtype, fill, without_prefix
from dflash_jax.checkpoints.safetensors_file import open_folder
from dflash_jax.checkpoints.write import SHARD_BYTES, write
from dflash_jax.config import DrafterConfig, load_config
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of


def load_drafter(
    folder: str | Path, dtype: jnp.dtype | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[DrafterConfig, Drafter]:
    """A DFlash or DFlash 2 drafter from its published folder; arguments and errors as for `load_target`."""
    folder = Path(folder)
    config = DrafterConfig.from_dict(load_config(folder))
    tensors = without_prefix(folder, open_folder(folder), PREFIXES, "fc.weight")
    dtype = default_dtype(dtype, tensors["fc.weight"])
    model = shapes_of(lambda rngs: Drafter(config, dtype=dtype, rngs=rngs))
    return config, fill(folder, model, drafter_table(config), tensors, mesh)


def save_drafter(
    drafter: Drafter, folder: str | Path, dtype: jnp.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a drafter in the published layout; arguments and errors as for `save_target`."""
    dtype = drafter.fc.kernel.dtype if dtype is None else dtype
    write(drafter, folder, drafter.config.to_dict(), drafter_table(drafter.config), "", dtype, shard_bytes)
