"""The engine on a mesh, of one process or of two, as a program; its answers as JSON.

python -m tests.serve.meshes FOLDER OUT.json MESH                    # FOLDER is as `write_pair` leaves it
python -m tests.serve.meshes FOLDER OUT.json MESH INDEX PORT PORT    # one of two processes
"""

import dataclasses
import json
import logging
import sys
from pathlib import Path

import jax
import numpy as np

import dflash_jax
from dflash_jax.decoding.generate import generate
from dflash_jax.decoding.output import Generation
from dflash_jax.pair import Pair
from dflash_jax.sharding import make_mesh, mesh_sizes
from serve.config import FILTERED, GREEDY, EngineConfig
from serve.engine import Engine
from serve.grammar import Grammar
from serve.hosts import HostsEngine
from serve.link import Link
from serve.programs import memory_of
from serve.requests import Request
from tests import sharded
from tests.serve import engines

NEW, REST, BEGIN = 20, 17, [0, 1, 2]
SCORED = 2  # this request, whose prompt takes two passes
CONFIG = EngineConfig(
    slots=2, buckets=(2,), max_length=64, page_size=8, checkpoints=3, widths=(1, 4), adaptive=False, rounds=2,
    prefill=((1, 16),), plans=(GREEDY, FILTERED), logprobs=1,
)  # fmt: skip


def write_pair(folder: Path, selector: bool) -> None:
    """That of `tests.sharded` with a drafter of two taps, which is one of DFlash 1 without the selector."""
    taps = {"dflash_config": sharded.DRAFTER["dflash_config"] | {"target_layer_ids": [0, 1]}}
    drafter = sharded.DRAFTER | taps
    if not selector:
        drafter = {name: drafter[name] for name in drafter if name.partition("_")[0] not in ("selector", "conv")}
        drafter["architectures"] = ["DFlashDraftModel"]
    sharded.write_pair(folder, drafter)
    # One letter more than the model has: llguidance wants an end token.
    engines.letters(sharded.BASE["vocab_size"] + 1).core.save(str(folder / "target" / "tokenizer.json"))


def load(folder: Path, mesh: str | None = None) -> Pair:
    made = None if mesh is None else make_mesh(**mesh_sizes(mesh))
    return dflash_jax.load(folder / "target", folder / "drafter", mesh=made)


def requests() -> list[Request]:
    """More of them than there are slots: greedy, sampled, and one with a grammar, which says only how it begins.

    One is scored.
    """
    rng, settings = np.random.default_rng(1), ({}, {"temperature": 0.8, "top_p": 0.9})
    prompts = [rng.integers(0, 15, n).tolist() for n in (3, 9, 21, 30, 5)]
    free = [Request(p, NEW, seed=i, **settings[i % 2]) for i, p in enumerate(prompts)]
    free[SCORED] = dataclasses.replace(free[SCORED], prompt_logprobs=1)
    return [*free, Request(prompts[0], NEW, grammar=Grammar("regex", f"abc[a-p]{{{REST}}}"))]


def expected(pair: Pair) -> list[list[int]]:
    """The tokens of the requests by `generate`."""
    *free, bound = requests()
    settings = {name: [getattr(r, name) for r in free] for name in ("temperature", "top_p", "seed")}
    answers = generate(pair, [r.prompt for r in free], max_new_tokens=NEW, **settings)
    assert any(max(answer.acceptance_lengths) > 1 for answer in answers)
    (rest,) = generate(pair, [[*bound.prompt, *BEGIN]], max_new_tokens=REST)
    return [*(answer.tokens for answer in answers), [*BEGIN, *rest.tokens]]


def scores(pair: Pair) -> list[float]:
    """Return log-probabilities of the scored prompt's tokens but the first, by the target's logits."""
    prompt = np.asarray(requests()[SCORED].prompt)
    logits = np.asarray(pair.logits(prompt[None]))[0, :-1].astype(np.float64)
    return (logits[np.arange(len(prompt) - 1), prompt[1:]] - np.log(np.exp(logits).sum(-1))).tolist()


def told(results: list[Generation]) -> dict:
    """Return what is compared of an engine's answers."""
    found = results[SCORED].prompt_logprobs or ()
    return {"tokens": [result.tokens for result in results], "scores": [one.logprob for one in found]}


def answers(pair: Pair) -> dict:
    """Return what an engine tells. Nothing may be compiled once it is there."""
    engine = Engine(pair, CONFIG)
    compiled: list[str] = []
    watch = logging.Handler()
    watch.emit = lambda record: compiled.append(record.getMessage())
    logging.getLogger("jax").addHandler(watch)
    with jax.log_compiles():
        found = engines.run(engine, requests())
    assert not [message for message in compiled if "Compiling" in message], compiled
    engines.check_idle(engine)
    shards = [s for x in jax.tree.leaves((pair.split[1], engine.programs.state)) for s in x.addressable_shards]
    assert memory_of(pair, engine.config.sizes).total == sum(s.data.nbytes for s in shards if s.device.id == 0)
    return told(found)


def together(pair: Pair, port: int) -> dict:
    """Of one of two processes: the leader's answers, and what it has counted. One more request is cancelled midway."""
    engine = HostsEngine(pair, dataclasses.replace(CONFIG, adaptive=True), Link("localhost", port, b"secret"))
    answered = {}
    if engine.link.leads:
        with engine:
            extra = engine.submit(dataclasses.replace(requests()[0], max_new_tokens=50))
            handles = [engine.submit(request) for request in requests()]
            next(iter(extra))
            extra.cancel()
            answered = told([h.result() for h in handles])
    else:
        engine.follow()
    engines.check_idle(engine)
    counted = dataclasses.asdict(engine.stats) | {"acceptance": engine.controller.free.acceptance}
    return answered | {"counted": {name: str(value) for name, value in counted.items()}}


def main() -> None:
    folder, out, mesh, *process = sys.argv[1:]
    if process:
        index, *ports = map(int, process)
        jax.distributed.initialize(f"localhost:{ports[0]}", num_processes=2, process_id=index)
        found = together(load(Path(folder), mesh), ports[1])
    else:
        found = answers(load(Path(folder), mesh))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
