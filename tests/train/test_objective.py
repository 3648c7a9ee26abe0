import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dflash_jax
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.pair import Pair
from dflash_jax.text import Tokenizer
from tests.train.small import CONFIG, MASK, SMALL, VOCAB, drafter, responses
from train import losses
from train.anchors import Blocks, cut_blocks, next_anchors, sample_anchors
from train.blocks import block_hidden
from train.drafter import DrafterTraining
from train.objective import (
    Predictions,
    acceptance_metrics,
    block_predictions,
    correct,
    drafter_loss,
    drafter_terms,
    observe,
)
from train.step import gradients_of

DFLASH2 = {"convolution": True, "selector_rank": 4}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"convolution": True, "selector_rank": 4},
        {"sliding_window": 6},
        {"sliding_window": 6, "causal": False},
    ],
)
def test_acceptance_in_training_is_the_acceptance_of_generate(target, extra):
    """Blocks cut at the places where `generate` drafted accept as many tokens as it did there."""
    model, prompt = drafter(target, **extra), [0, 1, 2, 1, 0]
    pair = Pair(target, model, Tokenizer(None, Path(), VOCAB))
    (made,) = dflash_jax.generate(pair, [prompt], max_new_tokens=60)
    ends = len(prompt) + np.cumsum([0, *made.acceptance_lengths])  # each round's anchor, in the sequence
    whole = [a for a in ends[:-1] if a + SMALL.block_size < len(prompt) + 60]
    tokens, anchors = jnp.asarray([prompt + made.tokens]), jnp.asarray([whole])

    @jax.jit
    def replay() -> jax.Array:
        loss_mask, real = jnp.arange(tokens.shape[1])[None] >= len(prompt), jnp.ones_like(anchors, bool)
        blocks = cut_blocks(tokens, loss_mask, anchors, real, rows=SMALL.block_size, mask_token=MASK)
        taps = target.sequence(tokens, tap_ids=model.config.tap_ids).taps
        hidden = block_hidden(model, target.embed.embedding[...][blocks.inputs], taps, anchors)
        rows = block_predictions(model, target, hidden, blocks, 0)
        return 1 + losses.accepted((rows.guess == blocks.labels).astype(float), blocks.weights).sum(-1)[0]

    rounds = replay()
    assert list(rounds) == made.acceptance_lengths[: len(whole)]
    assert 1 < np.mean(rounds) < SMALL.block_size


def test_metrics_against_a_loop():
    rng = np.random.default_rng(0)
    guess, labels = rng.integers(0, 2, (2, 3, 5, 4))
    counts = np.ones((3, 5, 4))
    counts[..., 0] = 0
    counts[1, 2, 2:] = 0
    places = np.zeros((3, 5), int)
    blocks = Blocks(*map(jnp.asarray, (places, places, labels, labels, counts)))
    found = acceptance_metrics(Predictions(jnp.ones((3, 5, 4)), jnp.asarray(guess)), blocks)
    metrics = {name: ratio.value for name, ratio in found.items()}
    lengths, right = [], [[], [], []]
    for b, a in np.ndindex(3, 5):
        wrong = [w for w in range(1, 4) if guess[b, a, w] != labels[b, a, w]]
        if (b, a) != (1, 2):
            lengths.append(min([*wrong, 4]))
        for w in range(1, 4):
            if counts[b, a, w]:
                right[w - 1].append(guess[b, a, w] == labels[b, a, w])
    np.testing.assert_allclose(metrics["acceptance"], np.mean(lengths), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], [np.mean(row) for row in right], rtol=1e-6)


@pytest.mark.parametrize("loss", ["decay", "dpace"])
def test_loss_is_the_weighted_mean_over_rows(target, loss):
    model, data = drafter(target), responses(2)
    config = dataclasses.replace(CONFIG, loss=loss, gamma=2.0)
    graph, params = nnx.split(model)
    target_graph, frozen = nnx.split(target)
    batch = {"tokens": data.tokens, "mask": data.loss_mask(), "step": np.uint32(7)}

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(config: DrafterTraining, batch: dict):
        return drafter_loss((graph, target_graph), config, params, frozen, batch)

    value, metrics = evaluate(config, batch)
    flat, _ = evaluate(dataclasses.replace(config, loss="decay", gamma=1e9), batch)
    np.testing.assert_allclose(flat, metrics["nll"], rtol=1e-5)
    assert value != flat
    again, _ = evaluate(config, batch)
    other, _ = evaluate(config, {**batch, "step": np.uint32(8)})
    assert value == again and value != other  # anchors come from seed and step


def test_selector_learns_among_its_candidates_with_the_true_predecessor(target):
    model = drafter(target, selector_rank=4)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1, 2, 4, 16)).astype(np.float32)
    labels = rng.integers(0, VOCAB, (1, 2, 4))
    places = jnp.zeros((1, 2), int)
    blocks = Blocks(places, places, jnp.asarray(labels), jnp.asarray(labels), jnp.ones((1, 2, 4)))
    short = Drafter(dataclasses.replace(model.config, selector_top_k=2), rngs=nnx.Rngs(0))
    nnx.update(short, nnx.state(model))
    rows = block_predictions(short, target, jnp.asarray(hidden), blocks, 0)
    for a, w in np.ndindex(2, 4):
        if w == 0:
            continue
        logits = np.asarray(short.head(target.head)(hidden[0, a, w]))
        ids = np.argsort(-logits)[:2]
        before = jnp.asarray(labels[0, a, w - 1 : w])
        extra = short.selector(before, jnp.asarray(ids), jnp.asarray(hidden[0, a, w]))[0]
        scores = logits[ids] + np.asarray(extra)
        assert rows.guess[0, a, w] == ids[scores.argmax()]
        assert rows.listed[0, a, w] == (labels[0, a, w] in ids)
        if labels[0, a, w] in ids:
            expected = np.log(np.exp(scores).sum()) - scores[list(ids).index(labels[0, a, w])]
            np.testing.assert_allclose(rows.selector_nll[0, a, w], expected, rtol=1e-4, atol=1e-5)


def parts(target, model, count: int = 2, taps: bool = False):
    """Graphs, parameters, frozen weights and a batch, which may have random taps: the target then compiles no pass."""
    graph, params = nnx.split(model)
    target_graph, frozen = nnx.split(target)
    data = responses(count)
    batch = {"tokens": data.tokens, "mask": data.loss_mask(), "step": np.uint32(7)}
    if taps:
        batch["taps"] = np.random.default_rng(5).normal(size=(count, 30, 16)).astype(np.float32)
    return (graph, target_graph), params, frozen, batch


def value_and_gradients(graphs, config, params, frozen, batch):
    run = jax.jit(jax.value_and_grad(lambda p, f, b: drafter_loss(graphs, config, p, f, b)[0]))
    return run(params, frozen, batch)


def assert_same(found, wanted, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1e-3, np.abs(b).max()))


@pytest.mark.slow
def test_features_read_from_disk_give_the_loss_of_the_target_online(target):
    model = drafter(target, **DFLASH2)
    graphs, params, frozen, batch = parts(target, model)
    taps = np.asarray(target.sequence(batch["tokens"], tap_ids=model.config.tap_ids).taps)
    online = value_and_gradients(graphs, CONFIG, params, frozen, batch)
    assert_same(value_and_gradients(graphs, CONFIG, params, frozen, batch | {"taps": taps}), online)


@pytest.mark.slow
def test_padding_changes_nothing(target):
    """Neither its tokens nor its features, though some sequences have too few positions for all blocks."""
    graphs, params, frozen, batch = parts(target, drafter(target, **DFLASH2), taps=True)
    padding = np.arange(30) >= np.array([[12], [30]])
    batch["segments"] = np.where(padding, 0, 1 + (np.arange(30) >= 7)).astype(np.int32)
    batch["mask"] = batch["mask"] & ~padding
    run = jax.jit(jax.value_and_grad(lambda p, f, b: drafter_loss(graphs, CONFIG, p, f, b)[0]))
    found = run(params, frozen, batch)
    other = dict(
        batch, tokens=np.where(padding, 1, batch["tokens"]), taps=np.where(padding[..., None], 9, batch["taps"])
    )
    assert_same(run(params, frozen, other), found, 1e-6)
    seen = dict(batch, mask=batch["mask"] | padding)
    assert abs(run(params, frozen, seen)[0] - found[0]) > 1e-3  # what a mask that lets padding in would give


@pytest.mark.slow
def test_layers_made_again_backwards_change_no_gradient(target):
    given = parts(target, drafter(target, num_layers=2, **DFLASH2), taps=True)
    whole = value_and_gradients(given[0], CONFIG, *given[1:])
    again = value_and_gradients(given[0], dataclasses.replace(CONFIG, remat=True), *given[1:])
    assert_same(again, whole)


@pytest.mark.slow
def test_bfloat16_computes_gradients_for_float32_parameters(target):
    given = parts(target, drafter(target, num_layers=2, **DFLASH2), taps=True)
    config = dataclasses.replace(CONFIG, compute="bfloat16")
    value, gradients = value_and_gradients(given[0], config, *given[1:])
    wanted, exact = value_and_gradients(given[0], CONFIG, *given[1:])
    assert value != wanted
    np.testing.assert_allclose(value, wanted, rtol=0.02)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {np.dtype(np.float32)}
    flat, exact_flat = (np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (gradients, exact))
    assert flat @ exact_flat / np.linalg.norm(flat) / np.linalg.norm(exact_flat) > 0.98


@pytest.mark.slow
def test_the_second_stage_compares_distributions_at_the_drafters_own_errors(target):
    """Draft-OPD against a loop: forward KL where accepted, fading reverse KL where rejected, at replayed blocks."""
    model = drafter(target)
    graphs, params, frozen, batch = parts(target, model)
    config = dataclasses.replace(CONFIG, loss="opd", rejected_decay=0.7)
    terms, _ = jax.jit(functools.partial(drafter_terms, graphs, config))(params, frozen, batch)

    tokens, mask = (jnp.asarray(batch[name]) for name in ("tokens", "mask"))
    scene = observe(target, model.config.tap_ids, batch)
    key = jax.random.fold_in(jax.random.key(config.seed), batch["step"])

    def drafted(anchors, real):
        blocks = cut_blocks(tokens, mask, anchors, real, rows=4, mask_token=MASK)
        hidden = block_hidden(model, target.embed.embedding[...][blocks.inputs], scene.taps, anchors)
        return blocks, hidden, block_predictions(model, target, hidden, blocks, 0)

    anchors, real = sample_anchors(key, mask, config.anchors)
    blocks, _, rows = drafted(anchors, real)
    reached = losses.accepted(correct(rows, blocks), blocks.weights).sum(-1).astype(int)
    anchors, real = next_anchors(anchors, real, reached, mask)
    blocks, hidden, rows = drafted(anchors, real)
    ours = np.asarray(jax.nn.log_softmax(model.head(target.head)(hidden)))
    theirs = np.asarray(jax.nn.log_softmax(target.head(scene.hidden)))
    total = weight = 0.0
    kinds = set()
    for b, a in np.ndindex(anchors.shape):
        rejected = 0
        for w in range(1, 4):
            if not blocks.weights[b, a, w]:
                continue
            q, p = ours[b, a, w], theirs[b, int(anchors[b, a]) + w - 1]
            if rejected or rows.guess[b, a, w] != blocks.labels[b, a, w]:
                kl, factor, kinds = np.sum(np.exp(q) * (q - p)), 0.7**rejected, kinds | {f"rejected {rejected}"}
                rejected += 1
            else:
                kl, factor, kinds = np.sum(np.exp(p) * (p - q)), 1.0, kinds | {"accepted"}
            total, weight = total + factor * kl, weight + factor
    assert {"accepted", "rejected 0", "rejected 1"} <= kinds
    np.testing.assert_allclose(terms["opd"].value, total / weight, rtol=1e-4)
    np.testing.assert_allclose(terms["opd"].weight, weight, rtol=1e-5)

    # Other losses have these blocks where they are asked to be on policy, also with taps from disk.
    config = dataclasses.replace(CONFIG, on_policy=True)
    batch = batch | {"taps": scene.taps}
    _, metrics = jax.jit(functools.partial(drafter_terms, graphs, config))(params, frozen, batch)
    np.testing.assert_allclose(metrics["nll"].value, acceptance_metrics(rows, blocks)["nll"].value, rtol=1e-5)


def test_the_second_stage_cannot_use_features_from_disk(target):
    model = drafter(target)
    graphs, params, frozen, batch = parts(target, model)
    config = dataclasses.replace(CONFIG, loss="opd")
    batch = batch | {"taps": np.zeros((2, 30, 16), np.float32)}
    with pytest.raises(InputError, match="loss is opd"):
        jax.eval_shape(functools.partial(drafter_terms, graphs, config), params, frozen, batch)


@pytest.mark.slow
def test_micro_batches_have_the_gradient_of_the_whole_batch(target):
    """Of weights that depend on the drafter (D-PACE), and of the selector's, which other rows have than the backbone's.

    Normalising each micro batch on its own would give another gradient.
    """
    graphs, params, frozen, batch = parts(target, drafter(target, **DFLASH2), count=6, taps=True)
    batch["mask"][:2, 12:] = False  # the first micro batches weigh less
    terms = functools.partial(drafter_terms, graphs, dataclasses.replace(CONFIG, loss="dpace"))
    whole, parted = (jax.jit(functools.partial(gradients_of, terms, parts=n))(params, frozen, batch) for n in (1, 3))
    assert_same(parted, whole)
    alone = []
    for first in (0, 2, 4):
        part = {name: x[first : first + 2] if np.ndim(x) else x for name, x in batch.items()}
        part["row"] = np.arange(first, first + 2)
        alone.append(jax.jit(functools.partial(gradients_of, terms))(params, frozen, part)[0])
    assert abs(np.mean(alone) - whole[0]) > 1e-3
