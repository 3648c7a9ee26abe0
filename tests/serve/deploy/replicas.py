"""Two replicas behind Ray Serve, one of which is killed while it has requests; run as a program.

python -m tests.serve.deploy.replicas FOLDER OUT.json PORT    # FOLDER is as `meshes.write_pair` leaves it
"""

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

from serve.deploy.ray_app import ReplicaConfig, deploy
from tests.serve import meshes

COUNT, STREAMS, NEW = 40, 4, 48


def bodies() -> list[dict[str, Any]]:
    """Requests, half of them sampled."""
    settings = ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.9})
    prompts = ["abcdefghijklmno"[i % 12 :] for i in range(COUNT)]
    return [{"prompt": p, "max_tokens": NEW, "seed": i, **settings[i % 2]} for i, p in enumerate(prompts)]


async def load(client: httpx.AsyncClient) -> dict[str, Any]:
    """All requests at once. A replica is killed as soon as some are answered and all streams have begun."""
    name = next(n for n in ray.util.list_named_actors(all_namespaces=True) if "#Replica#" in n["name"])
    replica = ray.get_actor(name["name"], name["namespace"])
    begun = [asyncio.Event() for _ in range(STREAMS)]
    streams = [asyncio.ensure_future(stream(client, event)) for event in begun]
    answers = [asyncio.ensure_future(client.post("/v1/completions", json=body)) for body in bodies()]
    for event in begun:
        await event.wait()
    while sum(answer.done() for answer in answers) < 4:
        await asyncio.sleep(0.01)
    ray.kill(replica)
    wrong = await client.post("/v1/completions", json={"prompt": "a", "temperature": -1})
    done = [await answer for answer in answers]
    return {
        "texts": [answer.json()["choices"][0]["text"] for answer in done],
        "tries": [int(answer.headers["dflash-tries"]) for answer in done],
        "streams": [await lines for lines in streams],
        "wrong": [wrong.status_code, wrong.json()["error"]["message"]],
    }


async def stream(client: httpx.AsyncClient, begun: asyncio.Event) -> list[str]:
    """The events of a long answer."""
    body = {"prompt": "a", "max_tokens": NEW, "temperature": 0, "stream": True}
    events = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            begun.set()
            events += [line] if line else []
    return events


async def run(port: int) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
        return await load(client)


def start() -> None:
    """Ray gives a node 30 seconds to start, which on two busy cores may be too few."""
    for left in reversed(range(4)):
        try:
            ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR")
            return
        except Exception:
            ray.shutdown()
            if not left:
                raise


def main() -> None:
    folder, out, port = sys.argv[1:]
    start()
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    config = dataclasses.replace(meshes.CONFIG, grammar=False, widths=(4,))
    serve.run(deploy(ReplicaConfig(config, f"{folder}/target", f"{folder}/drafter"), 2))
    found = asyncio.run(run(int(port)))
    ray.shutdown()  # Serve with it; asked for by itself, that takes seconds
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
