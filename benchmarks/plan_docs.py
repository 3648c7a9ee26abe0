"""`make plan-docs`: plans of Qwen3.5-397B-A17B with its published drafter on three topologies, as docs/plan.md.

Each plan is a process of its own (minutes, and some gigabytes); its JSON is kept in docs/plans, and `--keep` writes the
document from what is there, planning only what is missing.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.plan_report import size

DOCS = Path(__file__).parents[1] / "docs"
CONFIGS = ("docs/configs/qwen3.5-397b-a17b.json", "docs/configs/qwen3.5-397b-a17b-dflash.json")
PROCESSES = 2


@dataclass(frozen=True)
class Cell:
    """One plan."""

    topology: str
    mesh: str
    batch: int

    @property
    def arguments(self) -> list[str]:
        target, drafter = CONFIGS
        given = ["plan", "--target", target, "--drafter", drafter, "--topology", self.topology, "--mesh", self.mesh]
        return [*given, "--batch", str(self.batch)]

    @property
    def file(self) -> Path:
        return DOCS / "plans" / f"{self.topology.replace(':', '-')}-batch{self.batch}.json"


# v5p and v6e hold the weights over 64 chips; expert x tensor is as even as 2 KV heads and 512 experts allow.
CELLS = [
    Cell(topology, mesh, batch)
    for batch in (1, 8, 32)
    for topology, mesh in (
        ("tpu7x:2x2x2", "expert=4,tensor=4"),
        ("v5p:4x4x4", "expert=16,tensor=4"),
        ("v6e:8x8", "expert=16,tensor=4"),
    )
]


def main() -> int:
    """Plan, and write the document after every plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="plan only what docs/plans does not have compiled")
    parser.add_argument("--no-compile", action="store_true", help="compute only")
    given = parser.parse_args()
    (DOCS / "plans").mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in CELLS if not (given.keep and finished(cell))]
    done = []
    with ThreadPoolExecutor(PROCESSES) as pool:
        for ended in as_completed([pool.submit(run, cell, not given.no_compile) for cell in missing]):
            done.append(ended.result())
            plans = [(cell, json.loads(cell.file.read_text())) for cell in CELLS if cell.file.is_file()]
            (DOCS / "plan.md").write_text("\n".join(lines(plans)) + "\n")
    return 0 if all(done) else 1


def finished(cell: Cell) -> bool:
    """Whether there is a plan of it that says all that a compiler could."""
    found = json.loads(cell.file.read_text()) if cell.file.is_file() else None
    return found is not None and (found["compiled"] is not None or not found["memory"]["fits"])


def run(cell: Cell, compile_it: bool) -> bool:
    """Plan one cell; what fails to compile is only computed, and said to be."""
    command = [sys.executable, "-m", "dflash_jax", *cell.arguments, "--json"]
    for extra in ([], ["--no-compile"]) if compile_it else (["--no-compile"],):
        start = time.perf_counter()
        ended = subprocess.run([*command, *extra], capture_output=True, text=True, cwd=DOCS.parent, check=False)
        print(f"{' '.join(cell.arguments)} {' '.join(extra)}: {time.perf_counter() - start:.0f} s", flush=True)
        if ended.returncode == 0:
            cell.file.write_text(json.dumps(json.loads(ended.stdout), indent=1) + "\n")
            return not (compile_it and extra)
        print(ended.stderr.strip()[-2000:], flush=True)
    return False


HEAD = """# Plans for Qwen3.5-397B-A17B

Written by `make plan-docs`. The target is Qwen3.5-397B-A17B in bf16 (60 layers, 512 experts of which 10 a token), the
drafter its published DFlash drafter (block of 16), from configurations alone
([target](configs/qwen3.5-397b-a17b.json), [drafter](configs/qwen3.5-397b-a17b-dflash.json)); the context is 32,768
tokens. Everything is of one *device*: a chip, or half a chip on tpu7x.

**Compiled**: one round of the project (propose, verify, accept, commit; whole model, sharded) by the compiler of that
chip. Its memory, flops, bytes accessed, collectives and temporaries are the compiler's figures. Its bytes accessed
count, it seems, the matrices of all experts, as jax's grouped product states, where it reads those of the chosen.

**Computed**: weights and cache bytes from shapes and shardings; the roofline from these, the published peaks and the
assumption that every row chooses its experts by itself and uniformly (rows of one block choose alike in practice,
which makes rounds cheaper than here). Latencies of collectives and of launching are in neither; at batch 1 they can
be as long as the rest.

**Not measured**: anything. No accelerator was there.
"""


def lines(plans: list[tuple[Cell, dict[str, Any]]]) -> Iterator[str]:
    """The document."""
    yield HEAD
    yield "## Summary\n"
    columns = (
        "topology | mesh | batch | memory | fits | round | plain token | drafter | speed-up at 4 | pays from | compiled"
    )
    yield f"| {columns} |"
    yield "|---|---|" + "---:|" * 9
    for _, p in plans:
        yield _summary(p)
    yield "\n`memory`: arguments and temporaries where compiled, else arguments."
    yield "`drafter`: share of the round's roofline time, its head included."
    yield "`pays from`: tokens a round from which on a round is faster than plain decoding."
    for cell, p in plans:
        yield from _details(p, cell)


def _summary(p: dict[str, Any]) -> str:
    memory, speed = p["memory"], p["speedup"]
    mesh = ", ".join(f"{axis} {n}" for axis, n in p["mesh"].items())
    cells = [
        p["topology"], mesh, str(p["batch"]), size(memory["total"]), "yes" if memory["fits"] else "no",
        f"{speed['round_seconds'] * 1e3:.2f} ms", f"{speed['plain_seconds'] * 1e3:.2f} ms",
        f"{p['roofline']['drafter_share']:.1%}", f"{speed['speedup']:.2f}x", f"{speed['break_even']:.2f}",
        "yes" if _compiled(p) else "no",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _compiled(p: dict[str, Any]) -> dict[str, Any] | None:
    return p["compiled"] if p["compiled"] and "collectives" in p["compiled"] else None


def _details(p: dict[str, Any], cell: Cell) -> Iterator[str]:
    yield f"\n## {p['topology']}, batch {p['batch']}\n"
    yield f"```sh\ndflash {' '.join(cell.arguments)}\n```\n"
    yield "| part (computed) | bytes | GFLOP | sent | time | share |"
    yield "|---|" + "---:|" * 5
    for row in p["roofline"]["parts"]:
        sizes = f"{size(row['bytes'])} | {row['flops'] / 1e9:.1f} | {size(row['sent'])}"
        yield f"| {row['name']} | {sizes} | {row['seconds'] * 1e6:.0f} us | {row['share']:.1%} |"
    memory = p["memory"]
    yield f"\nWeights {size(memory['weights'])}, cache {size(memory['cache'])} of {size(memory['hbm'])} (computed)."
    if (found := _compiled(p)) is None:
        yield "Not compiled."
        return
    yield (
        f"Compiled in {found['seconds_to_compile']:.0f} s: temporaries {size(memory['temporaries'])}, "
        f"in all {size(memory['total'])}."
        + (f" {found['flops'] / 1e9:.0f} GFLOP and {size(found['bytes_accessed'])} accessed." if found["flops"] else "")
    )
    checks = (
        ("weight_all_gathers", "all-gathers of weights"),
        ("weight_copies", "copies of weights"),
        ("vocabulary_temporaries", "temporaries of size [rows, vocabulary]"),
    )
    yield "; ".join(f"{text}: {sum(r.get('count', 1) for r in found[name]) or 'none'}" for name, text in checks) + ".\n"
    kinds: dict[str, list[float]] = {}
    for row in found["collectives"]:
        kind = kinds.setdefault(row["kind"], [0, 0.0])
        kind[0] += row["count"]
        kind[1] += row["sent"]
    yield "| collective (compiled) | number | sent a device |"
    yield "|---|---:|---:|"
    for kind, (count, sent) in kinds.items():
        yield f"| {kind} | {count} | {size(sent)} |"
    yield "\n| largest temporaries (compiled) | bytes | memory | number | of |"
    yield "|---|---:|---|---:|---|"
    for row in found["temporaries"][:4]:
        where = f"`{row['source'] or row['op']}`"
        yield f"| `{row['shape']}` | {size(row['bytes'])} | {row['memory']} | {row['count']} | {where} |"


if __name__ == "__main__":
    sys.exit(main())
