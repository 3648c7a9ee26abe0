"""Makes the embedded pair, stage by stage: `python -m train.embedded`. A stopped run goes on where it was.

tokenizer -> target -> responses of the target -> drafter -> export to dflash_jax/embedded. The seeds are fixed; the
corpus is the standard library of the Python that runs this, so another version of Python gives another pair.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich import print

import dflash_jax
from dflash_jax.checkpoints import load_target, save_drafter, save_target
from dflash_jax.errors import InputError
from dflash_jax.models.target import Target
from dflash_jax.pair import Pair
from dflash_jax.text import Tokenizer
from train import corpus
from train.architecture import DrafterArchitecture
from train.command import command
from train.data import Corpus, DataConfig, Documents
from train.drafter import DrafterTraining, Setting, train_drafter
from train.loop import LoopConfig
from train.optimizer import OptimizerConfig
from train.records import JsonLines
from train.regenerate import RegenerateConfig, regenerate
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
    """The embedded drafter, as it is shipped."""
    return DrafterTraining(
        architecture=DrafterArchitecture(
            head_dim=64, intermediate_size=384, sliding_window=96, causal=False, convolution=True, selector_rank=64
        ),
        loop=LoopConfig(steps=8000, evaluate_every=400),
        optimizer=OptimizerConfig("muon", learning_rate=5e-3, adam_learning_rate=2e-3),
        loss="dpace",
        anchors=48,
    )


@dataclasses.dataclass(frozen=True)
class EmbeddedPair:
    """Trains the embedded pair and writes it into the package.

    Args:
        target: the target; its `out` also holds the tokenizer
        cuts: prompts for the target
        responses: what the target writes for the drafter's training
        data: how these become rows
        drafter: the drafter and how it is trained
        texts: folder of what the target writes
        drafter_out: folder of the drafter's run
        folder: where the pair goes
        prompts: held-out prompts to put beside it
    """

    target: TargetTraining = dataclasses.field(default_factory=default_target)
    cuts: corpus.PromptConfig = dataclasses.field(default_factory=lambda: corpus.PromptConfig(count=10240))
    responses: RegenerateConfig = dataclasses.field(default_factory=lambda: RegenerateConfig(response=192, sampled=0.3))
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(length=288, threads=1, taps="cache"))
    drafter: DrafterTraining = dataclasses.field(default_factory=default_drafter)
    texts: Path = Path("runs/embedded/texts")
    drafter_out: Path = Path("runs/embedded/drafter")
    folder: Path = Path(dflash_jax.__file__).parent / "embedded"
    prompts: int = 40


def run_target(config: TargetTraining) -> None:
    """Trains the target unless its exported model is there."""
    if not (config.out / "model" / "config.json").exists():
        model, done = train_target(config)
        if not done:
            raise InputError("the target's training was stopped by --target.loop.minutes; run again to go on")
        save_target(model, config.out / "model")


def corpus_documents(config: EmbeddedPair, target: Target) -> tuple[Documents, Documents]:
    """Responses to prompts from the training documents, and greedy ones to prompts from the held-out documents."""
    folder = config.folder / "tokenizer"
    tokenizer = load_or_train(folder, ())
    starts = np.array(["\n" in tokenizer.decode([token]) for token in range(len(tokenizer))])
    pair = Pair(target, None, Tokenizer(None, folder, target.config.vocab_size))
    few = config.data.held_out_count
    kinds = (
        ("responses", config.cuts, config.responses),
        (
            "held_out",
            dataclasses.replace(config.cuts, count=few),
            dataclasses.replace(config.responses, batch=min(config.responses.batch, few), sampled=0.0),
        ),
    )
    made = []
    for (name, cuts, responses), documents in zip(kinds, corpus.split(), strict=True):
        prompts = corpus.cut_prompts(
            [np.asarray(tokenizer(document.text)["input_ids"]) for document in documents], starts, cuts
        )
        if not regenerate(pair, prompts, responses, config.texts / name):
            raise InputError("the writing of responses was stopped; run again to go on")
        made.append(Corpus(JsonLines([config.texts / name]), config.data.length))
    return made[0], made[1]


def drafter_setting(config: EmbeddedPair) -> Setting:
    """What the drafter is trained for: the target as it is shipped, rounded to bf16, and what this one writes."""
    _, frozen = load_target(config.folder / "target", jnp.float32)
    learned, held_out = corpus_documents(config, frozen)
    folder = config.folder / "tokenizer"
    tokenizer, mask = Tokenizer(None, folder, frozen.config.vocab_size), load_or_train(folder, ()).mask_token_id
    return Setting(frozen, tokenizer, mask, learned, held_out, config.data, config.drafter_out)


def run_drafter(config: EmbeddedPair) -> None:
    """Lets the target write responses and trains the drafter on them."""
    model, done = train_drafter(config.drafter, drafter_setting(config))
    if not done:
        raise InputError("the drafter's training was stopped by --drafter.loop.minutes; run again to go on")
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
    save_tokenizer(load_or_train(config.target.tokenizer_folder, ()), folder / "tokenizer")
    run_drafter(config)
    write_prompts(folder / "prompts.jsonl", config.prompts)
    (folder / "LICENSE").write_text(corpus.LICENCE_NOTE, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    if size > MOST_BYTES:
        raise InputError(f"the pair takes {size} bytes, at most {MOST_BYTES} are wanted; choose a smaller architecture")
    print(f"{folder}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    command(EmbeddedPair, main)
