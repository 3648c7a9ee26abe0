"""A small random pair that 8 devices divide in every way, and generations with it; run as a program on many devices.

python -m tests.sharded FOLDER OUT.json '{"data": 8}' ...            # one process
python -m tests.sharded FOLDER OUT.json MESH --process 0 PORT        # one of two processes, 4 devices each
"""

import json
import os
import sys
from pathlib import Path

BASE = {
    "vocab_size": 16,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
TARGET = BASE | {
    "model_type": "qwen3_5_moe_text",
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 24,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 8,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
DRAFTER = BASE | {
    "architectures": ["DFlash2DraftModel"],
    "model_type": "qwen3",
    "block_size": 4,
    "num_target_layers": 2,
    "num_hidden_layers": 1,
    "conv_kernel_size": 2,
    "selector_rank": 4,
    "selector_top_k": 3,
    "dflash_config": {"mask_token_id": 15, "target_layer_ids": [0]},
}
LENGTHS = (3, 9, 140, 30, 5)
NEW = 24
SAMPLED = {"temperature": 0.8, "seed": [3, 4, 5, 6, 7], "top_p": 0.9}
SETTINGS = ({}, SAMPLED | {"stop": 7, "min_tokens": NEW, "logprobs": 3})


def write_pair(folder: Path, drafter_config: dict = DRAFTER) -> None:
    """Random weights, with which the greedy text varies and some drafts are right."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from dflash_jax.checkpoints import save_drafter, save_target
    from dflash_jax.config import DrafterConfig, TargetConfig
    from dflash_jax.models.drafter import Drafter
    from dflash_jax.models.target import Target

    rng = np.random.default_rng(0)

    def leaf(x):
        noise = rng.normal(size=x.shape) * (0.1 if x.ndim == 1 else 1.2 / np.sqrt(x.shape[-2]))
        return jnp.asarray(noise + (x.ndim == 1), x.dtype)

    target = nnx.eval_shape(lambda: Target(TargetConfig.from_dict(TARGET), rngs=nnx.Rngs(0)))
    drafter = nnx.eval_shape(lambda: Drafter(DrafterConfig.from_dict(drafter_config), rngs=nnx.Rngs(1)))
    for model, save, name in ((target, save_target, "target"), (drafter, save_drafter, "drafter")):
        graph, state = nnx.split(model)
        save(nnx.merge(graph, jax.tree.map(leaf, state)), folder / name)


def outputs(folder: Path, mesh: dict | None) -> list:
    """Tokens, acceptance lengths and likeliest tokens of all settings."""
    import numpy as np

    import dflash_jax
    from dflash_jax.sharding import make_mesh

    pair = dflash_jax.load(folder / "target", folder / "drafter", mesh=None if mesh is None else make_mesh(**mesh))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 15, n).tolist() for n in LENGTHS]
    out = [dflash_jax.generate(pair, prompts, max_new_tokens=NEW, **settings) for settings in SETTINGS]
    likeliest = [[[[t for t, _ in e.top] for e in g.logprobs or ()] for g in each] for each in out]
    return [
        [(g.tokens, g.acceptance_lengths, ids) for g, ids in zip(each, top, strict=True)]
        for each, top in zip(out, likeliest, strict=True)
    ]


def main() -> None:
    folder, out, *rest = sys.argv[1:]
    several = "--process" in rest
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={4 if several else 8}"
    os.environ["XLA_FLAGS"] = flags
    import jax

    if several:
        at = rest.index("--process")
        index, port = map(int, rest[at + 1 : at + 3])
        rest = rest[:at]
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    found = {mesh: outputs(Path(folder), json.loads(mesh)) for mesh in rest}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
