"""What a drafter is trained to do: from a batch of the target's responses to losses and the acceptance they promise.

The story: taps of the frozen target -> random anchors of each document -> blocks in one pass -> losses of their rows.
Sources: DFlash (arXiv 2602.06036), Draft-OPD (arXiv 2605.29343).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from pallas_kernels.documents import positions
from train import losses
from train.anchors import Blocks, cut_blocks, next_anchors, sample_anchors
from train.blocks import block_hidden
from train.losses import Ratio, weighted
from train.optimizer import names
from train.sampled import SampledVocabulary, sample_vocabulary
from train.step import Metrics, Pytree
from train.vocabulary import token_distances, token_scores

Batch = Mapping[str, Array]
_VOCABULARY = 1  # what a key is folded with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a drafter, and how it is computed.

    Args:
        anchors: blocks of a sequence, at random places, new ones every time the sequence comes up
        on_policy: the blocks start where verification stopped blocks at such places, as those of decoding do
        loss: position weights: "decay" is exp(-(k - 1) / gamma), "dpace" is D-PACE; "opd" is the second stage
        gamma: of "decay"; 4 for blocks of 8, 5 for 10, 7 for 16
        rejected_decay: of "opd": a rejected row weighs so much less than the rejected row before it
        vocabulary: tokens that a micro batch's loss is over: all of its own, and others at random; 0: all there are
        head_chunk: rows of logits made at once; 0 chooses
        remat: keep only the layers' inputs for the backward pass
        compute: dtype of the drafter's arithmetic; its parameters are always float32
        seed: of the initialisation, the order of the data and the anchors
    """

    anchors: int = 48
    on_policy: bool = False
    loss: Literal["decay", "dpace", "opd"] = "decay"
    gamma: float = 4.0
    rejected_decay: float = 0.8
    vocabulary: int = 0
    head_chunk: int = 0
    remat: bool = False
    compute: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scene:
    """What the blocks of a batch are drafted in; `hidden` is the target's own, unless its taps were read from disk."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    segments: Int[Array, "B T"] | None
    taps: Float[Array, "B T CD"]
    hidden: Float[Array, "B T D"] | None
    sampled: SampledVocabulary | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the rows of the blocks predict; row 0 predicts nothing. The last two are of DFlash 2's selector."""

    nll: Float[Array, "B A W"]
    guess: Int[Array, "B A W"]
    selector_nll: Float[Array, "B A W"] | None = None
    listed: Bool[Array, "B A W"] | None = None  # whether the label is among the candidates


def drafter_loss(
    graphs: tuple[nnx.GraphDef, nnx.GraphDef], config: Objective, params: Pytree, frozen: Pytree, batch: Batch
) -> tuple[jax.Array, Metrics]:
    """The value of `drafter_terms`, and its metrics as numbers."""
    terms, metrics = drafter_terms(graphs, config, params, frozen, batch)
    values = (ratio.value for ratio in terms.values())
    return sum(values, jnp.zeros(())), {name: ratio.value for name, ratio in metrics.items()}


def drafter_terms(
    graphs: tuple[nnx.GraphDef, nnx.GraphDef], config: Objective, params: Pytree, frozen: Pytree, batch: Batch
) -> tuple[dict[str, Ratio], dict[str, Ratio]]:
    """Losses, whose values are to be added, and metrics.

    The batch: `tokens` int [B, T], `mask` bool [B, T] (tokens of responses), `step` [] of which the anchors are drawn;
    if documents are packed, `segments` int [B, T]; `taps` [B, T, C * D] where the target need not run; `row` int [B]
    where the batch is a part of the global one.
    """
    drafter, target = nnx.merge(graphs[0], in_dtype(params, config.compute)), nnx.merge(graphs[1], frozen)
    scene = observe(target, drafter.config.tap_ids, batch)
    key = jax.random.fold_in(jax.random.key(config.seed), batch["step"])
    if config.vocabulary:
        chosen = jax.random.fold_in(key, _VOCABULARY)
        sampled = sample_vocabulary(chosen, scene.tokens, config.vocabulary, drafter.config.vocab_size)
        scene = dataclasses.replace(scene, sampled=sampled)
    anchors, real = sample_anchors(key, scene.mask, config.anchors, scene.segments, batch.get("row"))
    draft = partial(draft_blocks, drafter, target, scene, config)
    if config.on_policy or config.loss == "opd":  # a second block where verification stopped the first
        blocks, _, rows = draft(anchors, real)
        reached = losses.accepted(correct(rows, blocks), blocks.weights).sum(-1).astype(jnp.int32)
        anchors, real = next_anchors(anchors, real, reached, scene.mask, scene.segments)
    blocks, hidden, rows = draft(anchors, real)
    terms, weights = _terms(drafter, target, scene, config, blocks, hidden, rows)
    if rows.selector_nll is not None and rows.listed is not None:
        terms["selector"] = weighted(rows.selector_nll, weights * rows.listed)
    return terms, acceptance_metrics(rows, blocks)


def _terms(
    drafter: Drafter, target: Target, scene: Scene, config: Objective, blocks: Blocks, hidden: Array, rows: Predictions
) -> tuple[dict[str, Ratio], Array]:
    """The backbone's loss, and the weights of its rows."""
    if config.loss != "opd":
        weights = losses.dpace_weights(rows.nll, blocks.weights)
        if config.loss == "decay":
            weights = losses.decay_weights(blocks.weights, config.gamma)
        return {config.loss: weighted(rows.nll, weights)}, weights
    kept, rejected = losses.opd_weights(correct(rows, blocks), blocks.weights, config.rejected_decay)
    forward, reverse = distances(drafter, target, scene, blocks, hidden, config.head_chunk)
    weights = kept + rejected
    return {"opd": Ratio(jnp.sum(kept * forward + rejected * reverse), jnp.sum(weights))}, weights


def in_dtype(params: Pytree, dtype: str) -> Pytree:
    """The parameters to compute with. Vocabulary tables stay: their rows are cast as they are looked up."""

    def cast(path: tuple, x: Array) -> Array:
        return x if names(path) & {"predecessor", "successor"} else x.astype(dtype)

    return params if dtype == "float32" else jax.tree_util.tree_map_with_path(cast, params)


def observe(target: Target, tap_ids: tuple[int, ...], batch: Batch) -> Scene:
    """Runs the frozen target, unless the batch has its taps."""
    tokens, segments = batch["tokens"], batch.get("segments")
    if "taps" in batch:
        return Scene(tokens, batch["mask"], segments, batch["taps"], None)
    out = target.sequence(tokens, segments, tap_ids=tap_ids)
    taps, hidden = jax.lax.stop_gradient((out.taps, out.hidden))
    return Scene(tokens, batch["mask"], segments, taps, hidden)


def draft_blocks(
    drafter: Drafter, target: Target, scene: Scene, config: Objective, anchors: Array, real: Array
) -> tuple[Blocks, Float[Array, "B A W D"], Predictions]:
    """The blocks at these anchors, their hidden states, and what they predict."""
    c = drafter.config
    blocks = cut_blocks(
        scene.tokens, scene.mask, anchors, real, scene.segments, rows=c.block_size, mask_token=c.mask_token_id
    )
    shape = blocks.inputs.shape
    embedded = drafter.embed(target, blocks.inputs.reshape(len(anchors), -1)).reshape(*shape, -1)
    at = None if scene.segments is None else positions(scene.segments)
    hidden = block_hidden(
        drafter, embedded.astype(config.compute), scene.taps, anchors, blocks.starts, at, remat=config.remat
    )
    return blocks, hidden, block_predictions(drafter, target, hidden, blocks, config.head_chunk, scene.sampled)


def block_predictions(
    drafter: Drafter,
    target: Target,
    hidden: Float[Array, "B A W D"],
    blocks: Blocks,
    chunk: int,
    sampled: SampledVocabulary | None = None,
) -> Predictions:
    """Through the target's frozen head, or what was sampled of it, and the selector where there is one.

    The selector is taught with the true predecessor. Up to the first wrong token that is also the predecessor in its
    own walk, so its guesses give the acceptance of the walk.
    """
    x, labels, selector = hidden[:, :, 1:], blocks.labels[:, :, 1:], drafter.selector
    top = 1 if selector is None else min(drafter.config.selector_top_k, drafter.config.vocab_size)
    head, options = drafter.head(target.head), {"chunk": chunk, "top": top, "learn_top": selector is not None}
    if sampled is None:
        nll, values, ids = token_scores(head, x, labels, **options)
    else:
        places = sampled.places(labels)
        nll, values, ids = token_scores(sampled.head(head), x, places, sampled.raised, **options)
        ids = sampled.ids[ids]
    if selector is None:
        return _with_anchor_rows(Predictions(nll, ids[..., 0]))
    scores = values + selector(blocks.labels[:, :, :-1, None], ids, x)[..., 0, :]
    guess = jnp.take_along_axis(ids, jnp.argmax(scores, -1)[..., None], -1)[..., 0]
    match = ids == labels[..., None]
    selector_nll = losses.cross_entropy(scores, jnp.argmax(match, -1))
    return _with_anchor_rows(Predictions(nll, guess, selector_nll, match.any(-1)))


def _with_anchor_rows(made: Predictions) -> Predictions:
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 0))), made)


def check_whole(*, sampled: bool, cached: bool) -> None:
    """InputError for what leaves the loss "opd" without the distributions that it compares."""
    if sampled:
        raise InputError("loss is opd, which compares whole distributions; give vocabulary 0")
    if cached:
        raise InputError("loss is opd, which compares with the target's distribution; train it without cached taps")


def distances(
    drafter: Drafter, target: Target, scene: Scene, blocks: Blocks, hidden: Float[Array, "B A W D"], chunk: int
) -> tuple[Float[Array, "B A W"], Float[Array, "B A W"]]:
    """KL(target || drafter) and KL(drafter || target) of each row; 0 for the anchor's.

    The target's distribution of a row is that along its own response. It is the one that verification meets up to the
    first rejected row; behind it, verification would condition on the wrong draft.
    """
    check_whole(sampled=scene.sampled is not None, cached=scene.hidden is None)
    assert scene.hidden is not None
    B, A, W = blocks.labels.shape
    before = jnp.minimum(blocks.anchors[..., None] + jnp.arange(W - 1), scene.tokens.shape[1] - 1)
    taught = jnp.take_along_axis(scene.hidden, before.reshape(B, -1, 1), 1).reshape(B, A, W - 1, -1)
    found = token_distances(drafter.head(target.head), target.head, hidden[:, :, 1:], taught, chunk=chunk)
    forward, reverse = (jnp.pad(x, ((0, 0), (0, 0), (1, 0))) for x in found)
    return forward, reverse


def correct(rows: Predictions, blocks: Blocks) -> Float[Array, "B A W"]:
    """1 where a row's guess is the label."""
    return (rows.guess == blocks.labels).astype(jnp.float32)


def acceptance_metrics(rows: Predictions, blocks: Blocks) -> dict[str, Any]:
    """Accuracy of rows 1.., and tokens a round as greedy verification of these very blocks would give them.

    Blocks cut short by the end of a response are left out of the acceptance length.
    """
    right, counts = correct(rows, blocks), blocks.weights
    whole = jnp.min(counts[..., 1:], -1)
    prefix = losses.accepted(right, counts).sum(-1)
    return {
        "nll": weighted(rows.nll, counts),
        "accuracy": Ratio(jnp.sum(right * counts, (0, 1))[1:], jnp.sum(counts, (0, 1))[1:]),
        "acceptance": weighted(1 + prefix, whole),
    }
