"""`make recipe-docs`: a training step of every recipe, planned for its pod, as a table in docs/training.md.

Each plan is a process of its own; its JSON is kept in docs/plans, and the table is written from what is there. With
`--no-compile` a plan takes seconds and is only computed; compiling one takes minutes to an hour, and gigabytes.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dflash_jax.plan_report import size

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "train" / "recipes"
DOCUMENT, PLANS, CONFIGS = (ROOT / "docs" / name for name in ("training.md", "plans", "configs"))
BEGIN, END = "<!-- Written by `make recipe-docs`. -->", "<!-- End of what it writes. -->"


def main() -> int:
    """Plan the recipes that are named, and write the table of all that were ever planned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help="names of recipes; all if left out")
    parser.add_argument("--no-compile", action="store_true", help="compute only")
    parser.add_argument("--write", action="store_true", help="plan nothing, write the table")
    given = parser.parse_args()
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    done = [run(name, not given.no_compile) for name in given.recipes or ([] if given.write else names)]
    plans = {name: json.loads(kept(name).read_text()) for name in names if kept(name).is_file()}
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(before + "\n".join([BEGIN, *table(plans), END]) + rest.split(END)[1], encoding="utf-8")
    return 0 if all(done) else 1


def kept(name: str) -> Path:
    """Where the plan of a recipe is."""
    return PLANS / f"train-{name}.json"


def arguments(name: str) -> list[str]:
    """Of `dflash`."""
    target = CONFIGS.relative_to(ROOT) / f"{name.rpartition('-')[0]}.json"
    return ["plan", "--recipe", f"{RECIPES.relative_to(ROOT)}/{name}.yaml", "--target", str(target)]


def run(name: str, compile_it: bool) -> bool:
    """Plan one recipe; what does not compile says why, and the plan that is there is kept."""
    command = [*arguments(name), "--json", *([] if compile_it else ["--no-compile"])]
    start = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-m", "dflash_jax", *command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    print(f"dflash {' '.join(command)}: {time.perf_counter() - start:.0f} s", flush=True)
    if ended.returncode == 0:
        kept(name).write_text(json.dumps(json.loads(ended.stdout), indent=1) + "\n")
    else:
        print(ended.stderr.strip()[-2000:], flush=True)
    return ended.returncode == 0


def table(plans: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A row for each recipe; all figures are of one device and one step."""
    yield "\n| recipe | pod | arguments | with temporaries | of | flops | read and written | sent | step | tokens/s |"
    yield "|---|---|" + "---:|" * 8
    for name, plan in plans.items():
        memory, line = plan["memory"], plan["roofline"]
        rate = plan["batch"] * plan["context"] / line["seconds"]
        cells = [
            name, plan["topology"], size(memory["arguments"]), whole(plan), size(memory["hbm"]),
            f"{line['flops'] / 1e12:.0f} T", size(line["bytes"]), size(line["sent"]), f"{line['seconds']:.2f} s",
            f"{rate:,.0f}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield ""


def whole(plan: dict[str, Any]) -> str:
    """Memory with temporaries, or why it is not known."""
    if not plan["compiled"]:
        return "not compiled"
    return size(plan["memory"]["total"]) if "collectives" in plan["compiled"] else "does not fit"


if __name__ == "__main__":
    sys.exit(main())
