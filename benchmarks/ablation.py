"""`python -m benchmarks.ablation [ROW ...]`: drafters for the embedded target, each with one thing more than the last.

All learn from the same texts, with the same steps, anchors and optimiser, but the second stage, which goes on from the
row before it, and the shipped drafter, which is smaller, sees the last 96 tokens only, and learns for longer from more
texts. Acceptance is that of the real loop on the 20 held-out prompts of `make bench`, 200 new tokens each. A row that
is trained already is only measured again; a stopped run goes on.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import dflash_jax
from dflash_jax.checkpoints import save_drafter
from dflash_jax.decoding.generate import generate
from dflash_jax.pair import Pair
from serve.bench.prompts import load_prompts
from train.drafter import DrafterTraining, Setting, train_drafter
from train.embedded import EmbeddedPair, default_drafter, drafter_setting
from train.evaluate import round_figures
from train.loop import LoopConfig
from train.memory import keep_memory

OUT = Path("runs/ablation")
PROMPTS, TOKENS, SHORTER = 20, 200, 6
STEPS, SECOND_STAGE = 2600, 600
TEXTS = 4096  # of all rows but the shipped drafter


def dflash() -> DrafterTraining:
    """The backbone alone, with weights that fall along the block."""
    shipped = default_drafter()
    sizes = replace(
        shipped.architecture, num_layers=3, intermediate_size=512, convolution=False, selector_rank=0,
        sliding_window=None, causal=None,
    )  # fmt: skip
    return replace(shipped, loss="decay", architecture=sizes, loop=LoopConfig(steps=STEPS))


def dflash2() -> DrafterTraining:
    """With convolutions and a selector, and D-PACE's weights."""
    first = dflash()
    return replace(first, loss="dpace", architecture=replace(first.architecture, convolution=True, selector_rank=64))


def on_policy() -> DrafterTraining:
    """With blocks that start where verification stopped other ones."""
    return replace(dflash2(), on_policy=True)


def second_stage() -> DrafterTraining:
    """Draft-OPD, at a tenth of the learning rate."""
    best = dflash2()
    rate = best.optimizer.learning_rate / 10
    optimizer = replace(best.optimizer, learning_rate=rate, adam_learning_rate=rate)
    return replace(best, loss="opd", loop=LoopConfig(steps=SECOND_STAGE), optimizer=optimizer)


ROWS: dict[str, Callable[[], DrafterTraining]] = {
    "dflash": dflash,
    "dpace": lambda: replace(dflash(), loss="dpace"),
    "dflash2": dflash2,
    "on_policy": on_policy,
    "opd": second_stage,
    "shipped": default_drafter,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    names = parser.parse_args().rows or list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"there is no row {unknown[0]}; give some of {', '.join(ROWS)}")
    keep_memory()
    for name in names:
        setting = setting_of(name)
        print(json.dumps({"row": name} | figures(train(name, setting), setting)), flush=True)


def setting_of(name: str) -> Setting:
    """What the drafter of a row is trained for and on; its texts are written once."""
    pair = EmbeddedPair()
    if name != "shipped":
        pair = replace(pair, texts=OUT / "texts", cuts=replace(pair.cuts, count=TEXTS))
    return drafter_setting(pair)


def train(name: str, setting: Setting) -> Any:
    """The drafter of a row, trained as far as that is missing."""
    data = setting.data if name != "opd" else replace(setting.data, taps="online")  # it needs the target's own words
    start = OUT / "on_policy" / "model" if name == "opd" else None
    model, _ = train_drafter(ROWS[name](), replace(setting, out=OUT / name, data=data, start=start))
    save_drafter(model, OUT / name / "model", jnp.float32)
    return model


def figures(drafter: Any, setting: Setting) -> dict[str, Any]:
    """Tokens a round, and how often each position is kept, at the whole block and at a shorter one."""
    prompts, tokenizer, found = load_prompts(None, count=PROMPTS), dflash_jax.load().tokenizer, {}
    for width in (drafter.config.block_size, SHORTER):
        drafter.config = replace(drafter.config, block_size=width)
        pair = Pair(setting.target, drafter, tokenizer)
        made = [generate(pair, [prompt], max_new_tokens=TOKENS, width=width)[0] for prompt in prompts]
        found[f"block of {width}"] = round_figures(made, width)
    return found


if __name__ == "__main__":
    main()
