"""A small pair behind a real server, with a tokenizer that has a chat template and some long tokens."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import jax.numpy as jnp
import uvicorn
from fastapi import FastAPI
from tokenizers.pre_tokenizers import ByteLevel

from dflash_jax.checkpoints import save_target
from dflash_jax.pair import EMBEDDED, Pair
from dflash_jax.text import Tokenizer, load_tokenizer
from serve.api.app import create_app
from serve.api.starting import Starting
from serve.config import EVERYTHING, GREEDY, EngineConfig
from serve.engine import Engine
from tests.decoding import pairs
from tests.serve import engines

MODEL = "tiny"
CONFIG = EngineConfig(
    slots=4, buckets=(4,), max_length=512, widths=(1, 6), adaptive=False, rounds=4, prefill=((2, 64),),
    plans=(GREEDY, EVERYTHING), logprobs=5,
)  # fmt: skip
TEMPLATE = (
    r"{% for tool in tools or [] %}# {{ tool | tojson }}{{ '\n' }}{% endfor %}"
    r"{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    r"{% for call in message.tool_calls or [] %}"
    r" {{ call.function.name }}({{ call.function.arguments.a + 1 }}){% endfor %}"
    r"{{ '\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}<assistant{{ ' think' if enable_thinking else '' }}>{% endif %}"
    r"{{ '<think>\n' if aloud else '' }}"
)
# Texts that tests make the model say are whole tokens, after the first that the embedded tokenizer has learnt.
SAID = [
    "Sure.", "\n<tool", "_call>\n{", '"name": "add", "arg', 'uments": {"a": 1, ', '"b": "x y"}}\n', "</tool_c", "all>",
    "\n<tool_call>\n<function=add>\n<para", "meter=a>\n7\n</parameter>\n<parameter=b>\n", "8\n</parameter>\n</func",
    "tion>\n</tool_call>", "\n<tool_call>oh no", "<thi", "nk>\nhm", "m </thi", "nk>\n\nYes",
]  # fmt: skip
VOCAB = 384
WORDS = ["self", " in", "i", "mp", "or", "t"]


def make_tokenizer(folder: Path):
    folder.mkdir(exist_ok=True)
    facts = json.loads((EMBEDDED / "tokenizer" / "tokenizer.json").read_text())
    model, level = facts["model"], ByteLevel(add_prefix_space=False, use_regex=False)
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < VOCAB - len(SAID)}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    for i, text in enumerate(SAID):
        model["vocab"][level.pre_tokenize_str(text)[0][0]] = VOCAB - len(SAID) + i
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    (folder / "tokenizer_config.json").write_text((EMBEDDED / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder, VOCAB)


def without_template(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(tokenizer.core, Path("tests"), VOCAB)


def say(tokenizer, *texts: str) -> dict:
    """Settings with which the model says just this and ends: each token is wanted less than the one before it, and no
    more once it was said. No token may be there twice."""
    ids = [i for t in texts for i in ([VOCAB - len(SAID) + SAID.index(t)] if t in SAID else tokenizer.encode(t))]
    assert len({*ids, 0}) == len(ids) + 1
    bias = {str(token): 1e5 - 100 * i for i, token in enumerate([*ids, 0])}  # 0 ends it
    return {"logit_bias": bias, "temperature": 0, "extra_body": {"repetition_penalty": 1e6}}


@dataclass
class Served:
    """A server that runs, and the engine behind it."""

    url: str
    engine: Engine

    @property
    def tokenizer(self):
        return self.engine.pair.tokenizer

    def wait_idle(self) -> None:
        """Until nothing is left of any request; fails if something is after a while."""
        engines.wait_idle(self.engine)


def make_pair(tokenizer: Tokenizer) -> Pair:
    """By itself it says `WORDS` only; with these weights they vary, and at times a whole block of drafts is right."""
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 2048, "eos_token_id": 0}
    layers = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    target = pairs.make_target(pairs.TARGETS["qwen3_5_moe"] | sizes | layers, seed=13)
    (words,) = zip(*map(tokenizer.encode, WORDS), strict=True)
    target.lm_head.kernel[...] *= jnp.zeros(VOCAB).at[jnp.array(words)].set(3)
    taps = {"num_target_layers": 2, "dflash_config": {"mask_token_id": 1, "target_layer_ids": [0, 1]}}
    drafter = {"block_size": 6, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    return Pair(target, pairs.make_drafter(pairs.DRAFTERS["dflash"] | sizes | taps | drafter), tokenizer)


def write_target(folder: Path) -> None:
    save_target(make_pair(make_tokenizer(folder)).target, folder)


def make_engine(folder: Path) -> Engine:
    return Engine(make_pair(make_tokenizer(folder)), CONFIG)


def make_app(engine: Engine, **options) -> FastAPI:
    return create_app(engine, MODEL, **options)


@contextmanager
def listening(app: FastAPI | Starting) -> Iterator[str]:
    """uvicorn in a thread; its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as sock:
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, log_level="critical", lifespan="off", timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until, "the server does not start"
            time.sleep(0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


def events(response: httpx.Response) -> Iterator[dict]:
    """The data of server-sent events, up to [DONE]."""
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line:
            assert line.startswith("data: ")
            yield json.loads(line[6:])
    raise AssertionError("the stream has no end")


def texts(choices: Sequence, count: int) -> list[str]:
    """What each choice of streamed completions adds up to."""
    found = [""] * count
    for choice in choices:
        found[choice.index] += choice.text
    return found
