"""`dflash train drafter CONFIG.yaml`: from prompts to an exported drafter.

The story: prompts -> responses of the target -> rows of packed documents -> steps (taps of the frozen target, random
anchors, blocks in one pass, losses) -> checkpoints -> the best one exported, and a report.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from dflash_jax.checkpoints import load_target, save_drafter
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from dflash_jax.pair import find_folder
from dflash_jax.text import Tokenizer, load_tokenizer
from train.checks import check_run, mask_token
from train.configuration import to_yaml
from train.data import Corpus, DataConfig, Documents, Part, split
from train.drafter import DrafterTraining, Setting, train_drafter
from train.processes import MeshConfig, barrier, build_mesh, build_own_mesh, is_first, whole_arrays
from train.records import JsonLines
from train.regenerate import RegenerateConfig
from train.report import write_report
from train.responses import make_responses


@dataclasses.dataclass(frozen=True)
class DrafterRun:
    """Trains a drafter for a target: everything that `dflash train drafter` does, from one file.

    Args:
        target: the target's checkpoint, a folder or a hub name
        out: folder for responses, checkpoints, figures, the report, and the drafter, in out/model
        dtype: of the target's weights; default: float32 on the CPU, and the checkpoint's own on accelerators
        mask_token: id of a token that no text holds; default: the tokenizer's mask token
        start: a drafter to begin with, as that of a first stage; what it lacks of DFlash 2 begins as the identity
        mesh: how the devices are used
        pod: accelerators that this is meant for, as `dflash plan` names them; training does not look at it
        data: what to learn from
        regenerate: how the target writes responses to data.prompts
        training: the drafter and how it is trained
    """

    target: str
    out: Path = Path("runs/drafter")
    dtype: Literal["float32", "bfloat16"] | None = None
    mask_token: int | None = None
    start: str | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    pod: str | None = None
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    regenerate: RegenerateConfig = dataclasses.field(default_factory=RegenerateConfig)
    training: DrafterTraining = dataclasses.field(default_factory=DrafterTraining)


def read_documents(run: DrafterRun, tokenizer: Tokenizer, ends: tuple[int, ...]) -> tuple[Documents, Documents]:
    """(to learn from, held out), from the files that the configuration names or the target wrote."""
    data = run.data

    def corpus(paths: tuple[Path, ...]) -> Corpus:
        return Corpus(JsonLines(paths), data.length, tokenizer, ends, data.template)

    learned = corpus(data.responses or (run.out / "responses",))
    if data.held_out:
        return learned, Part(corpus(data.held_out), range(min(data.held_out_count, len(JsonLines(data.held_out)))))
    return split(learned, data.held_out_count, data.seed)


def main(run: DrafterRun) -> bool:
    """The command; False if it was stopped before the end. What can be told is refused before a weight is read."""
    check_run(run)
    mesh = build_mesh(run.mesh)
    folder = find_folder(run.target, "target")
    tokenizer = load_tokenizer(folder)
    mask = mask_token(run, tokenizer)
    answered = bool(run.data.prompts or run.regenerate.own_prompts) and not run.data.responses
    if answered and not make_responses(run.target, run.out, run.data, run.regenerate, mesh, run.dtype):
        return False
    config, target = load_target(folder, run.dtype and jnp.dtype(run.dtype), mesh)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    learned, held_out = read_documents(run, tokenizer, config.eos_token_ids)
    start = None if run.start is None else find_folder(run.start, "drafter")
    setting = Setting(target, tokenizer, mask, learned, held_out, run.data, run.out, mesh, start)
    drafter, done = train_drafter(run.training, setting)
    if done:
        export(drafter, run.out / "model", target)
        if is_first():
            write_report(run.out, to_yaml(run))
    return done


def respond(run: DrafterRun) -> bool:
    """`dflash train responses`: only the target's part; False if it was stopped before the end."""
    check_run(run)
    return make_responses(run.target, run.out, run.data, run.regenerate, build_own_mesh(run.mesh), run.dtype)


def export(drafter: Drafter, folder: Path, target: Target) -> None:
    """The published layout, in the target's dtype, written by the first process."""
    whole = whole_arrays(nnx.state(drafter))
    if is_first():
        save_drafter(nnx.merge(nnx.graphdef(drafter), whole), folder, target.embed.embedding.dtype)
    barrier("export")
