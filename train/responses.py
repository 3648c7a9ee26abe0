"""`dflash train responses CONFIG.yaml`: the target answers the prompts of a run's configuration."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

import dflash_jax
from dflash_jax.errors import InputError
from train.chat import prompt_ids
from train.data import DataConfig
from train.own_prompts import make_own_prompts
from train.records import JsonLines
from train.regenerate import RegenerateConfig, regenerate


def make_responses(
    target: str, out: Path, data: DataConfig, config: RegenerateConfig, mesh: Mesh | None, dtype: str | None = None
) -> bool:
    """Responses to data.prompts in out/responses; False if it was stopped before the last.

    `dtype` is that of the target's weights, as `dflash_jax.load` chooses it if there is none.
    """
    if not data.prompts and not config.own_prompts:
        raise InputError(
            "data.prompts is empty; give JSONL files of texts or chat messages to answer, or regenerate.own_prompts"
        )
    pair: Any = dflash_jax.load(target, config.drafter, dtype=dtype and jnp.dtype(dtype), mesh=mesh)
    prompts = []
    if data.prompts:
        lines = JsonLines(data.prompts)
        prompts += [prompt_ids(pair.tokenizer, lines[i], data.template) for i in range(len(lines))]
    if config.own_prompts:
        own = make_own_prompts(pair, config, data.template, out / "own_prompts")
        if own is None:
            return False
        prompts += own
    return regenerate(pair, prompts, config, out / "responses")
