"""Weights and responses, then `dflash train drafter`: a stopped run goes on where it was."""

import dataclasses
import gzip
import json
import sys
from pathlib import Path
from typing import Literal

from train.command import command, train
from train.smollm2.prompts import make_prompts
from train.smollm2.weights import convert, find_file

HERE = Path(__file__).parent
RESPONSES = HERE / "responses.jsonl.gz"
PROMPTS = {
    "cpu": {"library": 900, "maths": 900, "functions": 1300, "more_maths": 1100},
    "gpu": {"library": 10_000, "maths": 6000, "functions": 8000, "more_maths": 6000},  # the library has 1,605
}


@dataclasses.dataclass(frozen=True)
class SmolLM2:
    """A DFlash 2 drafter for SmolLM2-135M-Instruct, from responses that the model wrote.

    Args:
        on: "gpu" has the model write fifteen times as many responses, and trains on a hundred times as many blocks
        again: on "cpu" too, let the model write its responses, instead of taking those that come with this script
        only_target: prepare the model, and train nothing
        changes: to the run, as training.loop.steps=100
    """

    on: Literal["cpu", "gpu"] = "cpu"
    again: bool = False
    only_target: bool = False
    changes: tuple[str, ...] = ()


def main(config: SmolLM2) -> None:
    """The command."""
    out = Path("runs/smollm2")
    if not (out / "target" / "config.json").exists():
        convert(find_file(), out / "target")
    if config.only_target:
        print(f"done: {out / 'target'}")
        return
    if config.again or config.on == "gpu":
        prompts = out / f"prompts-{config.on}.jsonl"
        lines = (json.dumps(line) + "\n" for line in make_prompts(**PROMPTS[config.on]))
        prompts.write_text("".join(lines), encoding="utf-8")
        source = f"data.prompts=[{prompts}]"
    else:
        (out / "responses.jsonl").write_bytes(gzip.decompress(RESPONSES.read_bytes()))
        source = f"data.responses=[{out / 'responses.jsonl'}]"
    sys.exit(train("drafter", str(HERE / f"{config.on}.yaml"), (source, *config.changes), check=False))


if __name__ == "__main__":
    command(SmolLM2, main)
