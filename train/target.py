"""Trains a small target language model: `python -m train.target --out runs/target`.

The story: corpus -> tokens -> windows -> steps -> an exported checkpoint. Everything depends on the configuration and
its seed alone.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dflash_jax.checkpoints import save_target
from dflash_jax.config import GatedDeltaConfig, MoeConfig, RopeConfig, TargetConfig
from dflash_jax.models.target import Target
from train import corpus, losses
from train.command import command
from train.loop import LoopConfig, Task, run
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import Metrics, Pytree, TrainState, init_state, make_step
from train.tokenizer import VOCAB_SIZE, load_or_train
from train.windows import PackedWindows, fixed_windows, pack


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A qwen3_5_moe hybrid: in each period, linear attention layers and then one of full attention.

    Args:
        hidden_size: width of the residual stream
        periods: how often the pattern of layers repeats
        period: layers in a period, the last with full attention
        max_position: longest sequence the exported model admits to
    """

    hidden_size: int = 192
    periods: int = 2
    period: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 48
    partial_rotary: float = 0.25
    rope_theta: float = 1e4
    delta_k_heads: int = 2
    delta_v_heads: int = 4
    delta_head_dim: int = 48
    conv_kernel: int = 4
    num_experts: int = 8
    top_k: int = 2
    expert_size: int = 64
    shared_expert_size: int = 128
    max_position: int = 2048

    def target_config(self, vocab_size: int, end: int) -> TargetConfig:
        period = ("linear_attention",) * (self.period - 1) + ("full_attention",)
        return TargetConfig(
            family="qwen3_5_moe",
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            layer_types=period * self.periods,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope=RopeConfig(theta=self.rope_theta, dim=int(self.head_dim * self.partial_rotary)),
            qk_norm=True,
            gated_attention=True,
            norm="zero_centred",
            moe=MoeConfig(self.num_experts, self.top_k, self.expert_size, self.shared_expert_size),
            gated_delta=GatedDeltaConfig(
                self.delta_k_heads, self.delta_v_heads, self.delta_head_dim, self.delta_head_dim, self.conv_kernel
            ),
            max_position=self.max_position,
            eos_token_ids=(end,),
        )


@dataclasses.dataclass(frozen=True)
class TargetTraining:
    """Trains a target on the Python standard library.

    Args:
        out: folder for checkpoints, the log and, when all steps are done, the exported model in out/model
        tokenizer: folder of the tokenizer, which is trained first if there is none; default: out/tokenizer
        vocab_size: of a tokenizer that has to be trained
        architecture: sizes of the model
        loop: steps, checkpoints and evaluation
        optimizer: AdamW and its schedule
        sequence: tokens of a training window
        batch: windows in a step
        held_out: windows of the held-out loss
        balance: weight of the router's load-balancing loss
        head_chunk: rows of logits made at once; 0 is all
        seed: of the initialisation and of the order of the data
    """

    out: Path = Path("runs/target")
    tokenizer: Path | None = None
    vocab_size: int = VOCAB_SIZE
    architecture: Architecture = dataclasses.field(default_factory=Architecture)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    sequence: int = 512
    batch: int = 16
    held_out: int = 32
    balance: float = 0.01
    head_chunk: int = 0
    seed: int = 0

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer or self.out / "tokenizer"


def load_balance(logits: jax.Array, top_k: int) -> jax.Array:
    """1 where every expert gets the same share of rows (Switch Transformer, arXiv 2101.03961, eq. 4)."""
    experts = logits.shape[-1]
    _, chosen = jax.lax.top_k(logits, top_k)
    share = jnp.mean(jax.nn.one_hot(chosen, experts), axis=(0, 1))
    return experts * jnp.sum(share * jnp.mean(jax.nn.softmax(logits, -1), axis=0))


def language_model_loss(graph: nnx.GraphDef, params: Pytree, batch: jax.Array, balance: float, chunk: int):
    """(loss, metrics) of next-token prediction over windows [B, T + 1]."""
    target = nnx.merge(graph, params)
    out, labels = target.sequence(batch[:, :-1]), batch[:, 1:].reshape(-1)
    nll, guess = losses.chunked_head(target.head, out.hidden.reshape(len(labels), -1), labels, chunk)
    metrics: Metrics = {"nll": jnp.mean(nll), "accuracy": jnp.mean(guess == labels)}
    if not out.router_logits:
        return metrics["nll"], metrics
    top_k = target.config.moe.top_k
    metrics["balance"] = jnp.mean(jnp.stack([load_balance(logits, top_k) for logits in out.router_logits]))
    return metrics["nll"] + balance * metrics["balance"], metrics


def evaluator(graph: nnx.GraphDef, windows: np.ndarray, rows: int):
    """Held-out loss, `rows` windows at a time."""
    loss = jax.jit(lambda params, batch: language_model_loss(graph, params, batch, 0.0, 0)[1])

    def evaluate(state: TrainState) -> dict[str, float]:
        parts = [jax.device_get(loss(state.params, part)) for part in np.split(windows, len(windows) // rows)]
        return {f"held_out_{name}": float(np.mean([part[name] for part in parts])) for name in ("nll", "accuracy")}

    return evaluate


def train_target(config: TargetTraining) -> tuple[Target, bool]:
    """The model as far as it is trained, and whether that is to the end."""
    documents, held_out = corpus.split()
    tokenizer = load_or_train(config.tokenizer_folder, (d.text for d in documents))
    tokens, unseen = (pack(tokenizer, [d.text for d in part]) for part in (documents, held_out))
    data = PackedWindows(tokens, config.sequence, config.seed)

    architecture = config.architecture.target_config(len(tokenizer), tokenizer.eos_token_id)
    graph, params = nnx.split(Target(architecture, dtype=jnp.float32, rngs=nnx.Rngs(config.seed)))
    optimizer = make_optimizer(config.optimizer, config.loop.steps)

    def loss(params: Pytree, _: Pytree, batch: jax.Array):
        return language_model_loss(graph, params, batch, config.balance, config.head_chunk)

    task = Task(
        step=make_step(loss, optimizer),
        frozen=(),
        data=iter(data.batches(config.batch)),
        put=lambda batch, step: jax.device_put(batch),
        evaluate=evaluator(graph, fixed_windows(unseen, config.sequence, config.held_out), config.batch),
        tokens_per_step=config.batch * config.sequence,
    )
    outcome = run(init_state(params, optimizer), task, config.loop, config.out)
    return nnx.merge(graph, outcome.state.params), outcome.done


def main(config: TargetTraining) -> None:
    """The command."""
    target, done = train_target(config)
    if done:
        save_target(target, config.out / "model")


if __name__ == "__main__":
    command(TargetTraining, main)
