"""One small engine for all tests: programs are compiled once a process."""

import time
from dataclasses import replace
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.models import WordLevel

from dflash_jax.decoding.generate import generate
from dflash_jax.text import Tokenizer
from serve.config import EVERYTHING, GREEDY, EngineConfig
from serve.engine import Engine
from serve.requests import Request
from tests.decoding import pairs

# Three sequences of 96 tokens do not fit into the pages: some have to go and come again.
SMALL = EngineConfig(
    slots=3, buckets=(1, 3), max_length=96, page_size=8, pages=22, checkpoints=6, widths=(1, 4), adaptive=False,
    rounds=3, rounds_while_filling=1, prefill=((2, 8), (1, 16)), plans=(GREEDY, EVERYTHING),
    grammar=False,
)  # fmt: skip
KINDS = [
    {},
    {"temperature": 1.5, "seed": 3},
    {"temperature": 1.0, "top_k": 4, "top_p": 0.9, "min_p": 0.02, "seed": 4},
    {"temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, "seed": 5},
    {"frequency_penalty": 0.6, "logit_bias": {1: 1.5, 3: -2.0}},
]


@cache
def pair(family: str = "qwen3_5_moe"):
    """With a tokenizer whose texts are letters."""
    core = Core(WordLevel({chr(ord("a") + i): i for i in range(pairs.VOCAB)}, unk_token="a"))
    return replace(pairs.pair(family, sharpness=3.0), tokenizer=Tokenizer(core, Path("tests"), pairs.VOCAB))


def letters(count: int) -> Tokenizer:
    """Its tokens are the letters from a on, as bytes, which is what grammars need."""
    core = Core(models.BPE({chr(ord("a") + i): i for i in range(count)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(core, Path("tests"), count)


def engine(family: str = "qwen3_5_moe", **changes) -> Engine:
    return Engine(pair(family), replace(SMALL, **changes))


def run(engine: Engine, requests: list[Request]):
    """Results in order, without a thread."""
    handles = [engine.submit(request) for request in requests]
    drain(engine)
    return [handle.result() for handle in handles]


def drain(engine: Engine) -> None:
    steps = 0
    while engine.step():
        steps += 1
        assert steps < 5000, "the engine does not come to an end"


def expected(requests: list[Request]):
    """The same by `generate`, in one batch, which gives each what it gets alone."""
    settings = {name: [r.settings[name] for r in requests] for name in requests[0].settings}
    (new,), (stop,) = ({getattr(r, name) for r in requests} for name in ("max_new_tokens", "stop"))
    return generate(pair(), [r.prompt for r in requests], max_new_tokens=new, stop=stop, **settings)


def alone(request: Request):
    """The same request by `generate`."""
    return expected([request])[0]


def check(engine: Engine) -> None:
    """No page is lost, and none is held by nobody."""
    s = engine.scheduler
    s.pages.check(s.held(), [] if s.prefix is None else [node.page for node in s.prefix.nodes()])


def wait_idle(engine: Engine) -> None:
    """Until its thread has nothing left of any request, the last dispatch included; fails if it has after a while."""
    until = time.monotonic() + 30
    while engine.stats.unfinished or engine._flights:
        assert time.monotonic() < until, "requests are left behind"
        time.sleep(0.02)
    check_idle(engine)


def check_idle(engine: Engine) -> None:
    check(engine)
    s = engine.scheduler
    assert not s.running and not s.waiting and not engine._requests and not engine._flights
    assert s.pages.free + s.pages.idle == s.pages.count
