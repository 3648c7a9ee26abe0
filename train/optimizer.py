"""AdamW and Muon from optax, and which parameters each of them takes."""

import dataclasses
import functools
from typing import Literal

import jax
import optax
from optax import contrib


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with linear warm-up and cosine decay, both in steps.

    Muon (arXiv 2502.16982) orthogonalises the momentum of every matrix, and leaves vectors and vocabulary tables to
    AdamW. Its updates are scaled to AdamW's size, so that one learning rate serves both.

    Args:
        method: a drafter learns about twice as fast by "muon"
        learning_rate: the peak
        adam_learning_rate: the peak for what Muon leaves to AdamW; default: the same
        warmup: fraction of all steps spent warming up
        final: the last learning rate as a fraction of the peak
        weight_decay: for matrices only
        clip: largest global gradient norm
        b1: AdamW's decay of the mean of gradients
        b2: AdamW's decay of the mean of their squares
    """

    method: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-3
    adam_learning_rate: float | None = None
    warmup: float = 0.04
    final: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Warm-up and cosine over `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=max(1, round(config.warmup * steps)),
        decay_steps=steps,
        end_value=config.final * config.learning_rate,
    )


def names(path: tuple) -> set[str]:
    """The names along a parameter's path."""
    return {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}


def is_matrix(path: tuple, leaf: jax.Array) -> bool:
    """Whether weight decay applies: not to norms, biases, gates' decay rates and short convolutions."""
    return leaf.ndim >= 2 and not names(path) & {"bias", "conv", "base", "gate_up_bias", "down_bias"}


def muon_axes(path: tuple, leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
    """(inputs, outputs) of the matrices that Muon takes: kernels [in, (2,) out], and the stack of such of one a layer.

    Experts are left to AdamW, and vocabulary tables, whose rows are seen one at a time.
    """
    here = names(path)
    if not is_matrix(path, leaf) or here & {"embed", "lm_head", "predecessor", "successor", "experts"}:
        return None
    return contrib.MuonDimensionNumbers(int("kv_proj" in here), leaf.ndim - 1)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipped AdamW or Muon."""
    schedule = learning_rate(config, steps)
    matrices = functools.partial(jax.tree_util.tree_map_with_path, is_matrix)
    if config.method == "adamw":
        update = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=matrices)
    else:
        other = config.adam_learning_rate or config.learning_rate
        update = contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=learning_rate(dataclasses.replace(config, learning_rate=other), steps),
            muon_weight_dimension_numbers=functools.partial(jax.tree_util.tree_map_with_path, muon_axes),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), update)
