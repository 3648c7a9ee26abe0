"""How good a drafter is: on held-out responses as in training, and in the real decoding loop."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import dflash_jax
from dflash_jax.compare import acceptance_length
from dflash_jax.decoding.output import Generation
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from dflash_jax.pair import Pair
from dflash_jax.text import Tokenizer
from train.data import Batch, Documents, learnable
from train.feeding import Feed
from train.placing import on_mesh
from train.step import Pytree
from train.taps import TapCache
from train.tracking import Values


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The drafter at work, greedy, on held-out prompts: what its training is for.

    Args:
        prompts: how many; 0 decodes none
        tokens: of each response
    """

    prompts: int = 16
    tokens: int = 128


def held_out_metrics(
    loss: Callable, frozen: Pytree, batches: Sequence[Batch], feed: Feed, cache: TapCache | None
) -> Callable:
    """evaluate(parameters) -> means of the loss' metrics over the batches, always with the same anchors."""
    metrics = jax.jit(lambda params, frozen, batch: loss(params, frozen, batch)[1])

    def evaluate(params: Pytree) -> dict[str, Any]:
        parts = []
        for i, batch in enumerate(batches):
            own = feed.own(batch)
            own = cache.add(own) if cache else own
            own = {name: x for name, x in own.items() if name != "document"}
            with on_mesh(feed.mesh):
                parts.append(jax.device_get(metrics(params, frozen, feed.put(own, i))))
        if not parts:
            return {}
        return {f"held_out_{name}": np.mean([part[name] for part in parts], 0, float).tolist() for name in parts[0]}

    return evaluate


def held_out_prompts(documents: Documents, count: int) -> list[list[int]]:
    """The first `count` documents up to where their response begins."""
    prompts = []
    for i in range(len(documents)):
        example = documents[i]
        first = int(np.argmax(example["mask"]))
        if len(prompts) < count and learnable(example) and first:
            prompts.append(example["tokens"][:first].tolist())
    return prompts


def in_dtype_of(target: Target, params: Pytree) -> Pytree:
    """Parameters as they are served: in the target's dtype."""
    return jax.tree.map(partial(jax.lax.convert_element_type, new_dtype=target.embed.embedding.dtype), params)


def decode_figures(
    target: Target,
    drafter: Drafter,
    *,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    config: DecodeConfig,
    mesh: Mesh | None,
) -> dict[str, Any]:
    """`acceptance_length`: tokens a round of `dflash_jax.generate`; `accepted`: how often each position is kept."""
    if not prompts:
        return {}
    made = dflash_jax.generate(Pair(target, drafter, tokenizer, mesh), prompts, max_new_tokens=config.tokens)
    return round_figures(made, drafter.config.block_size)


def round_figures(made: Sequence[Generation], rows: int) -> dict[str, Any]:
    """Of all rounds of the generations. Position k is kept in a round that gives more than k tokens."""
    rounds = np.array([count for one in made for count in one.acceptance_lengths])
    if not len(rounds):  # every response ended with its first token
        return {}
    kept = [float(np.mean(rounds > k)) for k in range(1, rows)]
    return {"acceptance_length": acceptance_length(rounds.tolist()), "accepted": kept}


def evaluator(
    graph: nnx.GraphDef,
    target: Target,
    metrics: Callable,
    decode: Callable[[Drafter], dict[str, Any]],
    mesh: Mesh | None,
) -> Callable[[Any], Values]:
    """evaluate(state) -> all held-out figures."""

    def evaluate(state: Any) -> Values:
        with on_mesh(mesh):
            drafter = nnx.merge(graph, in_dtype_of(target, state.params))
        return {**metrics(state.params), **decode(drafter)}

    return evaluate
