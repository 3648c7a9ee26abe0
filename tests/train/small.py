"""A pair with a vocabulary so small that an untrained drafter is often right."""

import dataclasses

import numpy as np
from flax import nnx

from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from tests import weights
from tests.train import tiny
from train.architecture import DrafterArchitecture
from train.drafter import DrafterTraining
from train.loop import LoopConfig

SMALL = DrafterArchitecture(
    num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16, block_size=4, taps=1
)
CONFIG = DrafterTraining(
    architecture=SMALL, loop=LoopConfig(steps=6, save_every=2, evaluate_every=2, log_every=2), batch=2, anchors=5
)
VOCAB, END, MASK = 4, 3, 2


def target() -> Target:
    config = dataclasses.replace(tiny.TARGET.target_config(VOCAB, END), eos_token_ids=())
    return weights.noisy(lambda: Target(config, rngs=nnx.Rngs(1)))


def drafter(target: Target, **extra) -> Drafter:
    architecture = dataclasses.replace(SMALL, **extra)
    config = architecture.drafter_config(target.config, MASK)
    return weights.noisy(lambda: Drafter(config, rngs=nnx.Rngs(2)))


@dataclasses.dataclass(frozen=True)
class Responses:
    """Rows of 30 tokens, the first `prompts[b]` of them a prompt; as documents one by one."""

    tokens: np.ndarray
    prompts: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens[index], "mask": self.loss_mask()[index]}

    def loss_mask(self) -> np.ndarray:
        return np.arange(self.tokens.shape[1]) >= self.prompts[:, None]


def responses(count: int, seed: int = 0) -> Responses:
    rng = np.random.default_rng(seed)
    return Responses(rng.integers(0, VOCAB, (count, 30)).astype(np.int32), rng.integers(2, 10, count))
