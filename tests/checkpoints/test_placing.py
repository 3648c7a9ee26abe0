"""Where a checkpoint goes while it is read: across devices, and in how much memory."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.checkpoints.folders import target_folder

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: object, devices: int = 1) -> str:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_leaves_go_straight_to_their_shards(tmp_path):
    target_folder(tmp_path, "qwen3_moe")
    run(
        """
        import sys
        import flax.nnx as nnx
        import numpy as np
        from dflash_jax.checkpoints import load_target
        from dflash_jax.sharding import make_mesh, state_shardings
        from tests.checkpoints.folders import leaves

        mesh = make_mesh(expert=1, tensor=4)
        _, plain = load_target(sys.argv[1])
        _, model = load_target(sys.argv[1], mesh=mesh)
        kernel = model.layers[0].mixer.q_proj.kernel[...]
        assert len(kernel.sharding.device_set) == 4 and kernel.addressable_shards[1].data.shape == (32, 8)
        expected = leaves(plain)
        for path, leaf in leaves(model).items():
            np.testing.assert_array_equal(leaf, expected[path])
        asked = dict(nnx.to_flat_state(state_shardings(nnx.state(plain), mesh)))
        for path, leaf in nnx.to_flat_state(nnx.state(model)):
            assert leaf[...].sharding == asked[path].get_value(), path
        """,
        tmp_path,
        devices=4,
    )


def test_memory_stays_below_the_model_and_its_largest_leaf(tmp_path):
    """A bf16 checkpoint in several files read as float32: all at once would take 1.5 times the model and more."""
    script = """
        import resource, sys
        import jax, jax.numpy as jnp
        from flax import nnx
        from dflash_jax.checkpoints import load_target, save_target
        from dflash_jax.config import TargetConfig
        from dflash_jax.models.target import Target

        config = TargetConfig.from_dict({
            "model_type": "qwen3", "vocab_size": 8192, "hidden_size": 1024, "num_attention_heads": 8,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 2048, "num_hidden_layers": 8,
        })
        if sys.argv[2] == "save":
            save_target(Target(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), sys.argv[1], shard_bytes=50 * 2**20)
        else:
            jnp.zeros(1).block_until_ready()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            _, model = load_target(sys.argv[1])
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            sizes = [leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))]
            print((after - before) * 1024, sum(sizes), max(sizes))
        """
    run(script, tmp_path, "save")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    used, model, largest = map(int, run(script, tmp_path, "load").split())
    assert model > 350e6 and largest < 40e6
    assert used < model + 2 * largest, (used, model, largest)
