"""Two replicas behind Ray Serve, one of which is killed while it has requests. Run as a program:

python -m tests.serve.ray_replicas FOLDER OUT.json       # FOLDER as from `tests.sharded.write_pair`
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from tests.serve import meshes

COUNT = 40


def bodies() -> list[dict]:
    """Requests as a sender gives them, some of them sampled."""
    some = [
        {"prompt": r.prompt, "max_new_tokens": 30, "temperature": r.temperature, "seed": r.seed, "top_p": r.top_p}
        for r in meshes.requests()
    ]
    return [some[i % len(some)] for i in range(COUNT)]


async def load(handle, replicas) -> dict:
    """All requests at once; one replica is killed as soon as the first answers have come."""
    tasks = [asyncio.ensure_future(_ask(handle, body)) for body in bodies()]
    pids = {await replicas.pid.remote() for _ in range(20)}
    while sum(task.done() for task in tasks) < 4:
        await asyncio.sleep(0.02)
    open_then = sum(not task.done() for task in tasks)
    os.kill(min(pids), signal.SIGKILL)
    answers = await asyncio.gather(*tasks)
    wrong = await _ask(handle, {"prompt": [1], "temperature": -1})
    return {"answers": answers, "pids": len(pids), "open": open_then, "wrong": wrong}


async def _ask(handle, body):
    return await handle.complete.remote(body)


def main() -> None:
    folder, out = sys.argv[1:]
    import ray
    from ray import serve

    from serve.config import FILTERED, GREEDY
    from serve.deploy.ray_app import app

    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR")
    config = meshes.CONFIG | {"plans": (GREEDY, FILTERED), "adaptive": False}
    pair = {"target": str(Path(folder) / "target"), "drafter": str(Path(folder) / "drafter")}
    handle = serve.run(app(pair | {"replicas": 2} | config), route_prefix="/")
    replicas = serve.get_deployment_handle("Replica", "default")
    found = asyncio.run(load(handle, replicas))
    serve.shutdown()
    ray.shutdown()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
