"""Weights and prompts, then `dflash train drafter`: a stopped run goes on where it was."""

import dataclasses
import json
import sys
from pathlib import Path

from train.command import command, train
from train.smollm2.prompts import make_prompts
from train.smollm2.weights import convert, find_file

CONFIG = Path(__file__).parent / "run.yaml"


@dataclasses.dataclass(frozen=True)
class SmolLM2:
    """A DFlash 2 drafter for SmolLM2-135M-Instruct, from responses that the model writes here.

    Args:
        coding: prompts about functions of the standard library
        maths: word problems
        changes: to the run, as training.loop.steps=100
    """

    coding: int = 900
    maths: int = 900
    changes: tuple[str, ...] = ()


def main(config: SmolLM2) -> None:
    """The command."""
    out = Path("runs/smollm2")
    if not (out / "target" / "config.json").exists():
        convert(find_file(), out / "target")
    lines = (json.dumps(line) + "\n" for line in make_prompts(config.coding, config.maths))
    (out / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    sys.exit(train("drafter", str(CONFIG), config.changes, check=False))


if __name__ == "__main__":
    command(SmolLM2, main)
