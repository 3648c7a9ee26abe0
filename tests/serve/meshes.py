"""The engine on a mesh, as a program on 8 virtual devices; its answers as JSON.

python -m tests.serve.meshes FOLDER OUT.json '{"tensor": 8}' ...           # FOLDER as from `tests.sharded.write_pair`
python -m tests.serve.meshes FOLDER OUT.json MESH --process 0 PORT PORT    # one of two processes, 4 devices each
"""

import json
import logging
import os
import sys
from pathlib import Path

LENGTHS, NEW = (3, 9, 21, 30, 5), 20


CONFIG = {
    "slots": 2, "buckets": (2,), "max_length": 64, "page_size": 8, "checkpoints": 3, "widths": (1, 4), "rounds": 2,
    "prefill": ((1, 16),),
}  # fmt: skip


def loaded(folder: Path, mesh: dict | None, **config):
    """The pair and what its engine is like."""
    import dflash_jax
    from dflash_jax.sharding import make_mesh
    from serve.config import FILTERED, GREEDY, EngineConfig

    pair = dflash_jax.load(folder / "target", folder / "drafter", mesh=None if mesh is None else make_mesh(**mesh))
    return pair, EngineConfig(plans=(GREEDY, FILTERED), **CONFIG, **config)


def requests() -> list:
    """Greedy and sampled, more of them than there are slots."""
    import numpy as np

    from serve.requests import Request

    rng, settings = np.random.default_rng(1), ({}, {"temperature": 0.8, "top_p": 0.9})
    prompts = [rng.integers(0, 15, n).tolist() for n in LENGTHS]
    return [Request(p, NEW, seed=i, **settings[i % 2]) for i, p in enumerate(prompts)]


def answers(folder: Path, mesh: dict | None) -> list:
    """Tokens and acceptance lengths of the requests; nothing may be compiled once the engine is there."""
    import jax

    from serve.engine import Engine

    engine = Engine(*loaded(folder, mesh, adaptive=False))
    compiled: list[str] = []
    watch = logging.Handler()
    watch.emit = lambda record: compiled.append(record.getMessage())
    logging.getLogger("jax").addHandler(watch)
    with jax.log_compiles():
        handles = [engine.submit(request) for request in requests()]
        while engine.step():
            pass
    assert not [message for message in compiled if "Compiling" in message]
    return [(h.result().tokens, h.result().acceptance_lengths) for h in handles]


def together(folder: Path, mesh: dict, port: int) -> dict:
    """One of two processes: the leader's tokens, and what both have counted. One more request is cancelled."""
    import dataclasses

    from serve.hosts import HostsEngine, Link

    pair, config = loaded(folder, mesh)
    engine = HostsEngine(pair, config, link := Link("localhost", port, b"secret"))
    tokens = []
    if link.leads:
        with engine:
            extra = engine.submit(dataclasses.replace(requests()[0], max_new_tokens=50))
            handles = [engine.submit(request) for request in requests()]
            extra.cancel()
            tokens = [h.result().tokens for h in handles]
    else:
        engine.follow()
    counted = dataclasses.asdict(engine.stats) | {"acceptance": engine.controller.acceptance}
    return {"tokens": tokens, "counted": {name: str(value) for name, value in counted.items()}}


def main() -> None:
    folder, out, *meshes = sys.argv[1:]
    several = "--process" in meshes
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 if several else 8}"
    if several:
        import jax

        index, *ports = map(int, meshes[2:])
        jax.distributed.initialize(f"localhost:{ports[0]}", num_processes=2, process_id=index)
        found = together(Path(folder), json.loads(meshes[0]), ports[1])
    else:
        found = {mesh: answers(Path(folder), json.loads(mesh)) for mesh in meshes}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
