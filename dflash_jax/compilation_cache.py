"""A compilation cache on disk by default: the second start of a program does not compile again."""

import os
from pathlib import Path
from typing import Any

import jax


def enable() -> None:
    """Keep compiled programs in ~/.cache/dflash-jax ($XDG_CACHE_HOME/dflash-jax), unless jax is configured otherwise.

    A directory that is set already (in jax's configuration, or as JAX_COMPILATION_CACHE_DIR) stays, with its
    thresholds; JAX_ENABLE_COMPILATION_CACHE=false stays too. Where no directory can be made, programs are compiled at
    each start.
    """
    config: Any = jax.config  # its values are attributes that no type checker sees
    if config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dflash-jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write there can run code here
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Also the many small programs: together they take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
