"""One step of a drafter's training on this machine, the target's features given: `python -m benchmarks.train_step`.

4 sequences of 512, 64 anchors, blocks of 8, 3 layers, hidden 256, MLP 768, 4/2 heads of 64, 3 taps, vocabulary 4096,
AdamW, float32. Seconds are of a step, after compilation; memory is the largest that the process had resident, the
compiler's included.
"""

import argparse
import functools
import json
import resource
import statistics
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from dflash_jax.config import DrafterConfig, RopeConfig, TargetConfig
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from train.memory import compiled, keep_memory
from train.objective import Objective, drafter_terms
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import init_state, make_step

SIZES = {"vocab_size": 4096, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
ROPE = RopeConfig(theta=1e6, dim=64)
DRAFTER = DrafterConfig(
    **SIZES, num_layers=3, intermediate_size=768, layer_types=("full_attention",) * 3, causal=(False,) * 3, rope=ROPE,
    block_size=8, mask_token_id=1, tap_ids=(1, 3, 5), num_target_layers=8,
)  # fmt: skip
TARGET = TargetConfig("qwen3", **SIZES, layer_types=("full_attention",), rope=ROPE, intermediate_size=768)
BATCH, LENGTH, ANCHORS = 4, 512, 64


def measure(loss: Any, steps: int) -> dict:
    """Seconds a step and megabytes."""
    models = [lambda: Drafter(DRAFTER, rngs=nnx.Rngs(0)), lambda: Target(TARGET, rngs=nnx.Rngs(1))]
    drafter, target = (nnx.graphdef(nnx.eval_shape(build)) for build in models)
    params, frozen = jax.jit(lambda: [nnx.state(build()) for build in models])()
    objective = Objective(anchors=ANCHORS, loss=loss)
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    step = compiled(make_step(functools.partial(drafter_terms, (drafter, target), objective), optimizer))
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(2, SIZES["vocab_size"], (BATCH, LENGTH)).astype(np.int32),
        "mask": np.ones((BATCH, LENGTH), bool),
        "taps": rng.normal(size=(BATCH, LENGTH, 3 * SIZES["hidden_size"])).astype(np.float32),
    }
    state, seconds = jax.jit(functools.partial(init_state, optimizer=optimizer))(params), []
    for number in range(steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch | {"step": np.uint32(number)})
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"loss": loss, "seconds": statistics.median(seconds[1:]), "fastest": min(seconds[1:]), "megabytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", default="decay")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep-memory", action="store_true", help="as the trainers do: faster, and more is resident")
    arguments = parser.parse_args()
    if arguments.keep_memory:
        keep_memory()
    print(json.dumps(measure(arguments.loss, arguments.steps)))


if __name__ == "__main__":
    main()
