"""Training steps of a small pair that 8 devices divide in every way; run as a program on many devices.

python -m tests.train.sharded_step FOLDER MESH ...               # one process, 8 devices; FOLDER/0.npz and so on
python -m tests.train.sharded_step FOLDER MESH --process 0 PORT  # one of two processes, 4 devices each
python -m tests.train.sharded_step FOLDER MESH MESH --checkpoint # saved on one mesh, continued on the other
python -m tests.train.sharded_step FOLDER MESH ... --sampled     # losses over a part of a larger vocabulary
"""

import json
import os
import sys
from pathlib import Path

from tests.sharded import DRAFTER, TARGET

SMALL_TARGET = TARGET | {"num_experts": 8}
SMALL_DRAFTER = DRAFTER | {"num_hidden_layers": 1, "selector_rank": 8}
STEPS = 2
LARGE, SAMPLED = 128, 104  # a vocabulary, and a part of it that is larger than a batch


def pair(vocab: int = 16):
    """Graphs, and random host weights with which the target's text depends on what came before."""
    import numpy as np
    from flax import nnx

    from dflash_jax.config import DrafterConfig, TargetConfig
    from dflash_jax.models.drafter import Drafter
    from dflash_jax.models.target import Target

    rng = np.random.default_rng(0)

    def leaf(x):
        noise = rng.normal(size=x.shape) * (0.1 if len(x.shape) == 1 else 0.7 / np.sqrt(x.shape[-2]))
        return np.asarray(noise + (len(x.shape) == 1), x.dtype)

    import jax

    sizes = {"vocab_size": vocab}
    drafter_config = DrafterConfig.from_dict(SMALL_DRAFTER | sizes)
    config = TargetConfig.from_dict(SMALL_TARGET | sizes)
    drafter = nnx.split(nnx.eval_shape(lambda: Drafter(drafter_config, rngs=nnx.Rngs(1))))
    target = nnx.split(nnx.eval_shape(lambda: Target(config, rngs=nnx.Rngs(0))))
    return (drafter[0], target[0]), jax.tree.map(leaf, drafter[1]), jax.tree.map(leaf, target[1])


def global_batch(step: int) -> dict:
    """8 rows of packed documents of different lengths, of which different shares count."""
    import numpy as np

    rng = np.random.default_rng(step)
    T = 12  # with other lengths XLA's mistake in `Target.__call__` does not show
    cuts = np.sort(rng.integers(4, T, (8, 2)), 1)
    at = np.arange(T)
    segments = 1 + (at >= cuts[:, :1]) + (at >= cuts[:, 1:])
    segments[:4, -3:] = 0
    mask = (rng.random((8, T)) < np.linspace(0.5, 1.0, 8)[:, None]) & (segments > 0)
    return {
        "tokens": rng.integers(0, 15, (8, T)).astype(np.int32),
        "segments": segments.astype(np.int32),
        "mask": mask,
        "step": np.uint32(step),
    }


def setup(mesh, sampled: bool = False):
    """The loss, the step, a state and frozen weights on the mesh."""
    import functools

    import jax

    from dflash_jax.sharding import state_shardings
    from train.objective import Objective, drafter_terms
    from train.optimizer import OptimizerConfig, make_optimizer
    from train.placing import new_state, on_mesh
    from train.step import make_step

    graphs, params, weights = pair(LARGE) if sampled else pair()
    config = Objective(anchors=4, loss="dpace", remat=True, vocabulary=SAMPLED if sampled else 0)
    terms = functools.partial(drafter_terms, graphs, config)
    optimizer = make_optimizer(OptimizerConfig("muon", learning_rate=0.01, warmup=0.0), 10)
    state = new_state(lambda: jax.tree.map(jax.numpy.asarray, params), optimizer, mesh)
    placed = None if mesh is None else state_shardings(weights, mesh)
    with on_mesh(mesh):
        frozen = jax.jit(lambda: jax.tree.map(jax.numpy.asarray, weights), out_shardings=placed)()
    return terms, make_step(terms, optimizer), state, frozen


def steps(step, state, frozen, mesh, numbers):
    """The state after these steps, and their losses."""
    import jax

    from train.placing import on_mesh

    found = []
    with on_mesh(mesh):
        for number in numbers:
            state, metrics = step(state, frozen, fed(global_batch(number), mesh))
            found.append(float(jax.device_get(metrics["loss"])))
    return state, found


def fed(batch: dict, mesh) -> dict:
    """The batch on the mesh, of which every process gives its own rows."""
    from train.feeding import Feed

    feed, step = Feed(8, mesh), batch.pop("step")
    return feed.put(feed.own(batch), int(step))


def outcome(mesh) -> dict:
    """Losses of three steps, gradients of the first, parameters after the second: leaf by leaf."""
    import jax
    import numpy as np

    terms, step, state, frozen = setup(mesh)
    _, gradients = first_gradients(terms, state, frozen, mesh)
    state, found = steps(step, state, frozen, mesh, range(STEPS))
    after = [whole(x) for x in jax.tree.leaves(state.params)]
    found += steps(step, state, frozen, mesh, [STEPS])[1]
    named = {f"{name}{i}": x for name, xs in (("gradient", gradients), ("after", after)) for i, x in enumerate(xs)}
    return named | {"losses": np.array(found)}


def first_gradients(terms, state, frozen, mesh):
    """The loss and the gradients of the first batch."""
    import jax

    from train.placing import on_mesh
    from train.step import gradients_of

    with on_mesh(mesh):
        batch = fed(global_batch(0), mesh)
        loss, _, gradients = jax.jit(lambda p, f, b: gradients_of(terms, p, f, b))(state.params, frozen, batch)
    return whole(loss), [whole(x) for x in jax.tree.leaves(gradients)]


def sampled(mesh) -> dict:
    """The loss over a part of a larger vocabulary, and its gradients."""
    terms, _, state, frozen = setup(mesh, sampled=True)
    loss, gradients = first_gradients(terms, state, frozen, mesh)
    return {f"gradient{i}": x for i, x in enumerate(gradients)} | {"losses": loss}


def whole(x):
    """A global array on the host."""
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(x, tiled=True) if jax.process_count() > 1 else x)


def continued(mesh, folder: Path, other) -> dict:
    """Two steps on one mesh, saved; a third one on the other, from what was saved, laid out as it has to be."""
    import jax
    import numpy as np

    from train.checkpoints import Checkpoints

    _, step, state, frozen = setup(mesh)
    state, _ = steps(step, state, frozen, mesh, range(STEPS))
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(state, {"next": STEPS}, {})
    saved = [whole(x) for x in jax.tree.leaves(state)]
    _, step, blank, frozen = setup(other)
    with Checkpoints(folder, keep=2) as checkpoints:
        state, place = checkpoints.restore(blank)
    assert place == {"next": STEPS}
    for a, b in zip(saved, jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, whole(b))
    wanted = [x.sharding for x in jax.tree.leaves(blank)]
    assert [x.sharding for x in jax.tree.leaves(state)] == wanted
    state, found = steps(step, state, frozen, other, [STEPS])
    assert [x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(jax.tree.leaves(state), wanted, strict=True)]
    return {"losses": np.array(found)}


def main() -> None:
    folder, *rest = sys.argv[1:]
    several, restored = "--process" in rest, "--checkpoint" in rest
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={4 if several else 8}"
    os.environ["XLA_FLAGS"] = flags
    import jax
    import numpy as np

    from dflash_jax.sharding import make_mesh

    if several:
        index, port = map(int, rest[-2:])
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    meshes = [make_mesh(**json.loads(text)) for text in rest if text.startswith("{")]
    if restored:
        found = [continued(meshes[0], Path(folder) / "run", meshes[1])]
    else:
        found = list(map(sampled if "--sampled" in rest else outcome, meshes))
    for i, arrays in enumerate(found):
        np.savez(Path(folder) / f"{i}.npz", **arrays)


if __name__ == "__main__":
    main()
