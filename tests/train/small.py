"""A pair with a vocabulary so small that an untrained drafter is often right."""

import dataclasses

import numpy as np
from flax import nnx

from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from tests.train import tiny
from train.drafter import DrafterArchitecture, DrafterTraining
from train.loop import LoopConfig
from train.regenerate import Responses

SMALL = DrafterArchitecture(
    num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16, block_size=4, taps=1
)
CONFIG = DrafterTraining(
    SMALL, LoopConfig(steps=6, save_every=2, evaluate_every=2, log_every=2), batch=2, anchors=5, held_out=2
)
VOCAB, END, MASK = 4, 3, 2


def target() -> Target:
    config = dataclasses.replace(tiny.TARGET.target_config(VOCAB, END), eos_token_ids=())
    return tiny.noisy(lambda: Target(config, rngs=nnx.Rngs(1)))


def drafter(target: Target, **extra) -> Drafter:
    architecture = dataclasses.replace(SMALL, **extra)
    config = architecture.drafter_config(target.config, MASK)
    return tiny.noisy(lambda: Drafter(config, rngs=nnx.Rngs(2)))


def responses(count: int, seed: int = 0) -> Responses:
    rng = np.random.default_rng(seed)
    return Responses.build(rng.integers(0, VOCAB, (count, 30)).tolist(), rng.integers(2, 10, count).tolist())
