"""Makes the embedded pair, stage by stage: `python -m train.embedded`. A stopped run goes on where it was.

tokenizer -> target -> responses of the target -> drafter -> export to dflash_jax/embedded. The seeds are fixed; the
corpus is the standard library of the Python that runs this, so another version of Python gives another pair.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
from rich import print

import dflash_jax
from dflash_jax.checkpoints import load_target, save_drafter, save_target
from dflash_jax.errors import InputError
from train import corpus
from train.command import command
from train.drafter import DrafterArchitecture, DrafterTraining, corpus_responses, train_drafter
from train.loop import LoopConfig
from train.optimizer import OptimizerConfig
from train.regenerate import RegenerateConfig
from train.target import Architecture, TargetTraining, train_target
from train.tokenizer import load_or_train, save_tokenizer

MOST_BYTES = 16 * 10**6


def default_target() -> TargetTraining:
    """The embedded target."""
    return TargetTraining(
        out=Path("runs/embedded/target"),
        architecture=Architecture(
            hidden_size=256, head_dim=64, delta_head_dim=64, num_experts=4, expert_size=64, shared_expert_size=128
        ),
        loop=LoopConfig(steps=1000),
        batch=8,
    )


def default_drafter() -> DrafterTraining:
    """The embedded drafter."""
    return DrafterTraining(
        architecture=DrafterArchitecture(head_dim=64, intermediate_size=384),
        loop=LoopConfig(steps=4000),
        optimizer=OptimizerConfig("muon", learning_rate=5e-3),
        anchors=64,
    )


@dataclasses.dataclass(frozen=True)
class EmbeddedPair:
    """Trains the embedded pair and writes it into the package.

    Args:
        target: the target; its `out` also holds the tokenizer
        responses: what the target writes for the drafter's training
        drafter: the drafter and how it is trained
        drafter_out: folder of the drafter's run
        folder: where the pair goes
        prompts: held-out prompts to put beside it
        rows: block size to ship, the anchor included
    """

    target: TargetTraining = dataclasses.field(default_factory=default_target)
    responses: RegenerateConfig = dataclasses.field(default_factory=lambda: RegenerateConfig(sampled=0.1))
    drafter: DrafterTraining = dataclasses.field(default_factory=default_drafter)
    drafter_out: Path = Path("runs/embedded/drafter")
    folder: Path = Path(dflash_jax.__file__).parent / "embedded"
    prompts: int = 40
    rows: int = 6


def run_target(config: TargetTraining) -> None:
    """Trains the target unless its exported model is there."""
    if not (config.out / "model" / "config.json").exists():
        model, done = train_target(config)
        if not done:
            raise InputError("the target's training was stopped by --target.loop.minutes; run again to go on")
        save_target(model, config.out / "model")


def run_drafter(config: EmbeddedPair) -> None:
    """Lets the target write responses and trains the drafter on them: the target as it is shipped, rounded to bf16."""
    _, frozen = load_target(config.folder / "target", jnp.float32)
    tokenizer = load_or_train(config.target.tokenizer_folder, ())
    data = corpus_responses(
        frozen, tokenizer, config.responses, config.drafter.held_out, config.drafter_out / "responses"
    )
    model, done = train_drafter(config.drafter, frozen, tokenizer.mask_token_id, *data, config.drafter_out)
    if not done:
        raise InputError("the drafter's training was stopped by --drafter.loop.minutes; run again to go on")
    # Trained on blocks of 8 it runs on shorter ones too; 6 rows are the quickest on two CPU cores (`make bench`).
    model.config = dataclasses.replace(model.config, block_size=config.rows)
    save_drafter(model, config.folder / "drafter", jnp.bfloat16)


def write_prompts(path: Path, count: int) -> None:
    """Held-out prompts as JSON lines, so that they do not depend on the Python that later reads them."""
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in corpus.held_out_prompts(count))
    path.write_text("".join(lines), encoding="utf-8")


def main(config: EmbeddedPair) -> None:
    """The command."""
    folder = config.folder
    run_target(config.target)
    _, trained = load_target(config.target.out / "model", jnp.float32)
    save_target(trained, folder / "target", jnp.bfloat16)
    run_drafter(config)
    save_tokenizer(load_or_train(config.target.tokenizer_folder, ()), folder / "tokenizer")
    write_prompts(folder / "prompts.jsonl", config.prompts)
    (folder / "LICENSE").write_text(corpus.LICENCE_NOTE, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    if size > MOST_BYTES:
        raise InputError(f"the pair takes {size} bytes, at most {MOST_BYTES} are wanted; choose a smaller architecture")
    print(f"{folder}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    command(EmbeddedPair, main)
