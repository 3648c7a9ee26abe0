import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dflash_jax
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from dflash_jax.pair import Pair
from dflash_jax.text import Tokenizer
from tests.train import tiny
from train import losses
from train.anchors import Blocks, cut_blocks, decay
from train.blocks import block_hidden
from train.drafter import (
    DrafterArchitecture,
    DrafterTraining,
    Predictions,
    acceptance_metrics,
    block_predictions,
    drafter_loss,
    tap_ids,
    train_drafter,
)
from train.loop import LoopConfig
from train.regenerate import Responses

SMALL = DrafterArchitecture(
    num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16, block_size=4, taps=1
)
CONFIG = DrafterTraining(
    SMALL, LoopConfig(steps=6, save_every=2, evaluate_every=2, log_every=2), batch=2, anchors=5, held_out=2
)
VOCAB, END, MASK = 4, 3, 2  # so few tokens that an untrained drafter is often right


@pytest.fixture(scope="module")
def target() -> Target:
    config = dataclasses.replace(tiny.TARGET.target_config(VOCAB, END), eos_token_ids=())
    return tiny.noisy(lambda: Target(config, rngs=nnx.Rngs(1)))


def drafter(target: Target, **extra) -> Drafter:
    architecture = dataclasses.replace(SMALL, **extra)
    config = architecture.drafter_config(target.config, MASK)
    return tiny.noisy(lambda: Drafter(config, rngs=nnx.Rngs(2)))


def responses(count: int, seed: int = 0) -> Responses:
    rng = np.random.default_rng(seed)
    return Responses.build(rng.integers(0, VOCAB, (count, 30)).tolist(), rng.integers(2, 10, count).tolist())


@pytest.mark.parametrize(
    ("layers", "count", "expected"), [(8, 3, (1, 3, 5)), (36, 5, (1, 9, 17, 25, 33)), (8, 1, (4,))]
)
def test_taps_are_spread_and_leave_the_last_layer_out(layers, count, expected):
    assert tap_ids(layers, count) == expected


@pytest.mark.parametrize("extra", [{}, {"convolution": True, "selector_rank": 4}, {"sliding_window": 6}])
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
    blocks = Blocks(*map(jnp.asarray, (np.zeros((3, 5)), labels, labels, counts)))
    metrics = acceptance_metrics(Predictions(jnp.ones((3, 5, 4)), jnp.asarray(guess)), blocks)
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


@pytest.mark.parametrize("loss", ["decay", "pace"])
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
    assert decay(4, 2.0)[2] == pytest.approx(np.exp(-0.5))


def test_selector_learns_among_its_candidates_with_the_true_predecessor(target):
    model = drafter(target, selector_rank=4)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1, 2, 4, 16)).astype(np.float32)
    labels = rng.integers(0, VOCAB, (1, 2, 4))
    blocks = Blocks(jnp.zeros((1, 2), int), jnp.asarray(labels), jnp.asarray(labels), jnp.ones((1, 2, 4)))
    short = Drafter(dataclasses.replace(model.config, selector_top_k=2), rngs=nnx.Rngs(0))
    nnx.update(short, nnx.state(model))
    rows = block_predictions(short, target, jnp.asarray(hidden), blocks, 0)
    for a, w in np.ndindex(2, 4):
        if w == 0:
            continue
        logits = np.asarray(short.head(target.head)(hidden[0, a, w]))
        ids = np.argsort(-logits)[:2]
        extra = short.selector(jnp.asarray(labels[0, a, w - 1]), jnp.asarray(ids), jnp.asarray(hidden[0, a, w]))
        scores = logits[ids] + np.asarray(extra)
        assert rows.guess[0, a, w] == ids[scores.argmax()]
        assert rows.listed[0, a, w] == (labels[0, a, w] in ids)
        if labels[0, a, w] in ids:
            expected = np.log(np.exp(scores).sum()) - scores[list(ids).index(labels[0, a, w])]
            np.testing.assert_allclose(rows.selector_nll[0, a, w], expected, rtol=1e-4, atol=1e-5)


def test_training_resumes_exactly(target, tmp_path):
    data, held_out = responses(6), responses(2, seed=1)
    run = functools.partial(train_drafter, target=target, mask_token=MASK, data=data, held_out=held_out)
    whole, done = run(CONFIG, out=tmp_path)
    assert done
    shutil.rmtree(tmp_path / "checkpoints" / "6")  # as if killed after step 4
    resumed, _ = run(CONFIG, out=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(model) for model in (whole, resumed)))
