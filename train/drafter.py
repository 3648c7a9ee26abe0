"""Trains a DFlash drafter for a frozen target: `python -m train.drafter --target runs/target/model ...`.

The story: responses of the target -> batches -> steps on the loss of `train.objective` -> an exported drafter.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from dflash_jax.checkpoints import load_target, save_drafter
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from dflash_jax.pair import Pair
from dflash_jax.text import Tokenizer
from train import corpus
from train.command import command
from train.data import shuffled
from train.loop import LoopConfig, Task, run
from train.objective import Objective, drafter_loss, drafter_terms
from train.optimizer import OptimizerConfig, make_optimizer
from train.regenerate import RegenerateConfig, Responses, regenerate
from train.step import Pytree, TrainState, init_state, make_step
from train.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class DrafterArchitecture:
    """Sizes of a drafter; it takes the target's width, vocabulary, embedding and head.

    Args:
        num_layers: draft layers, all with full attention unless `sliding_window` is set
        block_size: rows of a block, the anchor included
        taps: how many of the target's layers are tapped
        sliding_window: window of sliding layers, which are also causal inside the block; default: full attention
        convolution: DFlash 2's grouped convolutions along the block
        selector_rank: rank of DFlash 2's candidate selector; 0 is none
    """

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 48
    intermediate_size: int = 384
    block_size: int = 8
    taps: int = 3
    sliding_window: int | None = None
    convolution: bool = False
    selector_rank: int = 0

    def drafter_config(self, target: TargetConfig, mask_token: int) -> DrafterConfig:
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        return DrafterConfig(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            layer_types=(kind,) * self.num_layers,
            causal=(self.sliding_window is not None,) * self.num_layers,
            sliding_window=self.sliding_window,
            rope=dataclasses.replace(target.rope, dim=self.head_dim),
            rms_norm_eps=target.rms_norm_eps,
            block_size=self.block_size,
            mask_token_id=mask_token,
            tap_ids=tap_ids(target.num_layers, self.taps),
            num_target_layers=target.num_layers,
            max_position=target.max_position,
            conv_kernel_size=2 if self.convolution else 0,
            selector_rank=self.selector_rank,
        )


@dataclasses.dataclass(frozen=True)
class DrafterTraining(Objective):
    """How a drafter is trained on the target's responses.

    Args:
        architecture: sizes of the drafter
        loop: steps, checkpoints and evaluation
        optimizer: AdamW and its schedule
        batch: sequences in a step
        parts: micro batches in which a step works on them, with the same result
        spike: a step whose gradient is so many times longer than usual is skipped; 0 skips only what is not finite
        held_out: sequences of the held-out loss
    """

    architecture: DrafterArchitecture = dataclasses.field(default_factory=DrafterArchitecture)
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(steps=3000))
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    batch: int = 8
    parts: int = 1
    spike: float = 10.0
    held_out: int = 64


def tap_ids(layers: int, count: int) -> tuple[int, ...]:
    """The layers to tap: spread evenly, never the last one."""
    if count == 1:
        return (layers // 2,)
    return tuple(round(1 + i * (layers - 4) / (count - 1)) for i in range(count))


def batches(responses: Responses, size: int, seed: int):
    """step -> batch, every sequence once an epoch."""
    mask = responses.loss_mask()

    def batch(step: int) -> dict[str, np.ndarray | np.uint32]:
        rows = [item for _, item in shuffled(len(responses), size, seed, step)]
        return {"tokens": responses.tokens[rows], "mask": mask[rows], "step": np.uint32(step)}

    return batch


def evaluator(loss, frozen: Pytree, responses: Responses, size: int):
    """Metrics over held-out responses, always with the same anchors."""
    metrics = jax.jit(lambda params, frozen, batch: loss(params, frozen, batch)[1])
    mask = responses.loss_mask()

    def evaluate(state: TrainState) -> dict[str, float | list[float]]:
        parts = [
            metrics(
                state.params, frozen, {"tokens": responses.tokens[i : i + size], "mask": mask[i : i + size], "step": i}
            )
            for i in range(0, len(responses) - size + 1, size)
        ]
        host = jax.device_get(parts)
        return {f"held_out_{name}": np.mean([m[name] for m in host], 0, float).tolist() for name in host[0]}

    return evaluate


def train_drafter(
    config: DrafterTraining, target: Target, mask_token: int, data: Responses, held_out: Responses, out: Path
) -> tuple[Drafter, bool]:
    """The drafter as far as it is trained, and whether that is to the end."""
    architecture = config.architecture.drafter_config(target.config, mask_token)
    graph, params = nnx.split(Drafter(architecture, dtype=jnp.float32, rngs=nnx.Rngs(config.seed)))
    target_graph, frozen = nnx.split(target)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    terms, loss = (functools.partial(f, (graph, target_graph), config) for f in (drafter_terms, drafter_loss))
    task = Task(
        step=make_step(terms, optimizer, parts=config.parts, spike=config.spike),
        frozen=frozen,
        batch=batches(data, config.batch, config.seed),
        evaluate=evaluator(loss, frozen, held_out, config.batch),
        tokens_per_step=config.batch * data.tokens.shape[1],
    )
    state = run(init_state(params, optimizer), task, config.loop, out)
    return nnx.merge(graph, state.params), int(state.step) == config.loop.steps


@dataclasses.dataclass(frozen=True)
class DrafterRun:
    """Lets a target write responses to prompts from the Python standard library, and trains a drafter on them.

    Args:
        target: folder of the target's checkpoint
        tokenizer: folder of the tokenizer, which has to have a mask token
        out: folder for responses, checkpoints, the log and, when all steps are done, the exported drafter in out/model
        responses: what the target writes
        training: the drafter and how it is trained
    """

    target: Path
    tokenizer: Path
    out: Path = Path("runs/drafter")
    responses: RegenerateConfig = dataclasses.field(default_factory=RegenerateConfig)
    training: DrafterTraining = dataclasses.field(default_factory=DrafterTraining)


def corpus_responses(
    target: Target, tokenizer: PreTrainedTokenizerBase, config: RegenerateConfig, held_out: int, folder: Path
) -> tuple[Responses, Responses]:
    """Responses to prompts from the training documents, and greedy ones to prompts from the held-out documents."""
    starts = np.array(["\n" in tokenizer.decode([token]) for token in range(len(tokenizer))])
    seen, unseen = ([np.asarray(tokenizer(d.text)["input_ids"]) for d in part] for part in corpus.split())
    few = dataclasses.replace(config, count=held_out, batch=min(config.batch, held_out), sampled=0.0)
    pair = Pair(target, None, Tokenizer(None, folder, target.config.vocab_size))
    data = regenerate(pair, seen, starts, config, folder / "train")
    return data, regenerate(pair, unseen, starts, few, folder / "held_out")


def main(config: DrafterRun) -> None:
    """The command."""
    _, target = load_target(config.target, jnp.float32)
    tokenizer = load_tokenizer(config.tokenizer)
    held_out = config.training.held_out
    data = corpus_responses(target, tokenizer, config.responses, held_out, config.out / "responses")
    drafter, done = train_drafter(config.training, target, tokenizer.mask_token_id, *data, config.out)
    if done:
        save_drafter(drafter, config.out / "model")


if __name__ == "__main__":
    command(DrafterRun, main)
