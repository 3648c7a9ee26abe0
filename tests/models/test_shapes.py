"""Models without numbers are the models."""

import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax.config import TargetConfig, read_json
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target

FILE = Path(__file__).parents[2] / "docs" / "configs" / "qwen3.5-35b-a3b.json"


def test_shapes_are_those_of_the_model():
    config = TargetConfig.from_dict(read_json(FILE))
    config = replace(config, layer_types=config.layer_types[2:5])
    found = shapes_of(lambda rngs: Target(config, dtype=jnp.bfloat16, rngs=rngs))
    wanted = nnx.eval_shape(lambda: Target(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    (graph, state), (other_graph, other) = nnx.split(found), nnx.split(wanted)
    assert graph == other_graph
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), other)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))


def test_many_layers_take_as_long_as_few_of_them_many_times():
    config = TargetConfig.from_dict(read_json(FILE))

    def seconds(layers: int) -> float:
        cut = replace(config, layer_types=("full_attention",) * layers)
        start = time.process_time()
        shapes_of(lambda rngs: Target(cut, rngs=rngs))
        return time.process_time() - start

    few = min(seconds(10) for _ in range(3))
    assert seconds(80) < 16 * few  # 8 times as long; flax's counting keys: above 30 times
