"""Checkpoints in and out: Hugging Face folders of safetensors, one name table per model family."""

from dflash_jax.checkpoints.drafter import load_drafter, load_drafter_config, save_drafter
from dflash_jax.checkpoints.target import load_target, save_target

__all__ = ["load_drafter", "load_drafter_config", "load_target", "save_drafter", "save_target"]
