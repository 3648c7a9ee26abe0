"""The held-out prompts of the embedded pair: beginnings of Python code that neither model was trained on."""

import importlib.resources
import json

from dflash_jax.errors import InputError


def held_out_prompts(count: int) -> list[str]:
    """The first `count` prompts of dflash_jax/embedded/prompts.jsonl."""
    file = importlib.resources.files("dflash_jax") / "embedded" / "prompts.jsonl"
    if not file.is_file():
        raise InputError("the embedded pair has no prompts.jsonl; `make embedded` writes it")
    prompts = [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines() if line]
    if not 1 <= count <= len(prompts):
        raise InputError(f"{count} prompts were asked for; the embedded pair has 1 to {len(prompts)}")
    return prompts[:count]
