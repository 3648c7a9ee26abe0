"""Weights and responses, then `dflash train drafter`: a stopped run goes on where it was."""

import dataclasses
import gzip
import json
import sys
from pathlib import Path

from train.command import command, train
from train.smollm2.prompts import make_prompts
from train.smollm2.weights import convert, find_file

HERE = Path(__file__).parent
CONFIG, RESPONSES = HERE / "run.yaml", HERE / "responses.jsonl.gz"
PROMPTS = {"library": 900, "maths": 900, "functions": 1300, "more_maths": 1100}


@dataclasses.dataclass(frozen=True)
class SmolLM2:
    """A DFlash 2 drafter for SmolLM2-135M-Instruct, from responses that the model wrote.

    Args:
        again: let the model write its responses again, instead of taking those that come with this script
        changes: to the run, as training.loop.steps=100
    """

    again: bool = False
    changes: tuple[str, ...] = ()


def main(config: SmolLM2) -> None:
    """The command."""
    out = Path("runs/smollm2")
    if not (out / "target" / "config.json").exists():
        convert(find_file(), out / "target")
    if config.again:
        lines = (json.dumps(line) + "\n" for line in make_prompts(**PROMPTS))
        (out / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
        source = f"data.prompts=[{out / 'prompts.jsonl'}]"
    else:
        (out / "responses.jsonl").write_bytes(gzip.decompress(RESPONSES.read_bytes()))
        source = f"data.responses=[{out / 'responses.jsonl'}]"
    sys.exit(train("drafter", str(CONFIG), (source, *config.changes), check=False))


if __name__ == "__main__":
    command(SmolLM2, main)
