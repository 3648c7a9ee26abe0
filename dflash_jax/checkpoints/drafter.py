"""Loading and saving a drafter."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.checkpoints.drafter_table import MASK_EMBEDDING, PREFIXES, drafter_table
from dflash_jax.checkpoints.fill import default_dtype, fill, without_prefix
from dflash_jax.checkpoints.mask_embedding import FILE, read_mask_embedding, write_mask_embedding
from dflash_jax.checkpoints.safetensors_file import open_folder
from dflash_jax.checkpoints.write import SHARD_BYTES, write
from dflash_jax.config import DrafterConfig, load_config
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of


def load_drafter_config(folder: str | Path) -> DrafterConfig:
    """Return what a published folder says of its drafter. InputError as for `DrafterConfig.from_dict`."""
    folder = Path(folder)
    return replace(DrafterConfig.from_dict(load_config(folder)), mask_embedding=(folder / FILE).is_file())


def load_drafter(
    folder: str | Path, dtype: jnp.dtype | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[DrafterConfig, Drafter]:
    """A DFlash or DFlash 2 drafter from its published folder; arguments and errors as for `load_target`."""
    folder = Path(folder)
    config = load_drafter_config(folder)
    tensors = without_prefix(folder, open_folder(folder), PREFIXES, "fc.weight")
    if config.mask_embedding:
        tensors[MASK_EMBEDDING] = read_mask_embedding(folder / FILE, config.mask_token_id, config.hidden_size)
    dtype = default_dtype(dtype, tensors["fc.weight"])
    model = shapes_of(lambda rngs: Drafter(config, dtype=dtype, rngs=rngs))
    return config, fill(folder, model, drafter_table(config), tensors, mesh)


def save_drafter(
    drafter: Drafter, folder: str | Path, dtype: jnp.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a drafter in the published layout; arguments and errors as for `save_target`."""
    folder, config = Path(folder), drafter.config
    dtype = drafter.fc.kernel.dtype if dtype is None else dtype
    table = [leaf for leaf in drafter_table(config) if leaf.path != MASK_EMBEDDING]
    write(drafter, folder, config.to_dict(), table, "", dtype, shard_bytes)
    (folder / FILE).unlink(missing_ok=True)  # of an earlier drafter
    if drafter.mask_embedding is not None:
        values = np.asarray(drafter.mask_embedding[...]).astype(np.dtype(dtype))
        write_mask_embedding(folder / FILE, values, config.mask_token_id)
