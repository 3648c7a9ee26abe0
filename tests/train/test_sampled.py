"""Losses over a part of the vocabulary, against plain numpy and against losses over all of it."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from dflash_jax.text import Tokenizer
from tests import weights
from tests.train import small, tiny
from train.anchors import Blocks
from train.data import DataConfig
from train.drafter import Setting, make_task
from train.evaluate import DecodeConfig
from train.objective import block_predictions, drafter_terms
from train.sampled import SampledVocabulary, sample_vocabulary
from train.step import init_state
from train.vocabulary import token_scores

VOCAB, SIZE = 200, 90
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (2, 30)).astype(np.int32)


def sampled(seed: int) -> SampledVocabulary:
    return sample_vocabulary(jax.random.key(seed), jnp.asarray(TOKENS), SIZE, VOCAB)


@pytest.fixture(scope="module")
def models() -> tuple[Target, Drafter]:
    config = dataclasses.replace(tiny.TARGET.target_config(VOCAB, 3), eos_token_ids=())
    architecture = dataclasses.replace(small.SMALL, selector_rank=4)
    target = weights.noisy(lambda: Target(config, rngs=nnx.Rngs(1)))
    return target, weights.noisy(lambda: Drafter(architecture.drafter_config(config, 2), rngs=nnx.Rngs(2)))


def test_all_tokens_of_the_batch_are_there_and_the_others_stand_for_those_left_out():
    own = np.unique(TOKENS)
    part = sampled(0)
    assert len(part.ids) == SIZE and np.all(np.diff(part.ids) > 0) and set(own) <= set(part.ids.tolist())
    others = ~np.isin(part.ids, own)
    np.testing.assert_allclose(part.raised[others], np.log((VOCAB - len(own)) / (SIZE - len(own))), rtol=1e-6)
    assert not np.any(part.raised[~others]) and others.sum() == SIZE - len(own)
    np.testing.assert_array_equal(part.ids[part.places(jnp.asarray(TOKENS))], TOKENS)
    assert set(sampled(1).ids.tolist()) != set(part.ids.tolist())


def test_sums_over_the_vocabulary_are_right_on_the_average():
    mass = np.random.default_rng(0).exponential(size=VOCAB)

    @jax.jit
    def sums(key: jax.Array) -> jax.Array:
        part = sample_vocabulary(key, jnp.asarray(TOKENS), SIZE, VOCAB)
        return jnp.sum(jnp.asarray(mass)[part.ids] * jnp.exp(part.raised))

    found = np.array([sums(key) for key in jax.random.split(jax.random.key(0), 2000)])
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - mass.sum()) < 4 * error < 0.01 * mass.sum()


def test_predictions_against_numpy(models):
    target, model = models
    rng, part = np.random.default_rng(1), sampled(0)
    hidden = rng.normal(size=(1, 2, 4, 16)).astype(np.float32)
    labels = rng.choice(TOKENS.ravel(), (1, 2, 4))
    places = jnp.zeros((1, 2), int)
    blocks = Blocks(places, places, jnp.asarray(labels), jnp.asarray(labels), jnp.ones((1, 2, 4)))
    rows = jax.jit(lambda h: block_predictions(model, target, h, blocks, 0, part))(hidden)
    ids = np.asarray(part.ids)
    for a, w in np.ndindex(2, 4):
        if w == 0:
            continue
        logits = np.asarray(model.head(target.head)(hidden[0, a, w]), np.float64)
        raised = logits[ids] + np.asarray(part.raised)
        np.testing.assert_allclose(
            rows.nll[0, a, w], np.log(np.exp(raised).sum()) - logits[labels[0, a, w]], rtol=1e-5, atol=1e-5
        )
        top = ids[np.argsort(-logits[ids])][: model.config.selector_top_k]
        before = jnp.asarray(labels[0, a, w - 1 : w])
        extra = model.selector(before, jnp.asarray(top), jnp.asarray(hidden[0, a, w]))[0]
        assert rows.guess[0, a, w] == top[(logits[top] + np.asarray(extra)).argmax()]
        assert rows.listed[0, a, w] == (labels[0, a, w] in top)


def test_gradients_are_those_of_the_whole_on_the_average(models):
    head = models[1].head(models[0].head)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 4, 16)), jnp.float32)
    labels = jnp.asarray(TOKENS.ravel()[:8].reshape(1, 2, 4))
    whole = jax.grad(lambda h: token_scores(head, h, labels)[0].sum())(hidden)

    @functools.partial(jax.jit, static_argnums=1)
    def error(key: jax.Array, raise_it: bool) -> jax.Array:
        part = sample_vocabulary(key, jnp.asarray(TOKENS), SIZE, VOCAB)
        places, raised = part.places(labels), part.raised if raise_it else None
        return jax.grad(lambda h: token_scores(part.head(head), h, places, raised)[0].sum())(hidden) - whole

    keys = jax.random.split(jax.random.key(0), 500)
    right, not_raised = (
        np.array([error(key, raise_it) for key in keys]) / np.linalg.norm(whole) for raise_it in (1, 0)
    )
    one = np.mean([np.linalg.norm(x) for x in right])
    assert np.linalg.norm(right.mean(0)) < one / 5 < 0.1
    assert np.linalg.norm(not_raised.mean(0)) > one / 3


def test_a_step_scores_a_part_and_what_is_held_out_all(models):
    target, model = models
    (graph, params), (target_graph, frozen) = nnx.split(model), nnx.split(target)
    batch = {"tokens": TOKENS, "mask": np.ones(TOKENS.shape, bool), "step": np.uint32(7)}
    architecture = dataclasses.replace(small.SMALL, selector_rank=4)
    config = dataclasses.replace(
        small.CONFIG, vocabulary=SIZE, architecture=architecture, decode=DecodeConfig(prompts=0)
    )
    found = []
    for size in (0, SIZE):
        terms = functools.partial(drafter_terms, (graph, target_graph), dataclasses.replace(config, vocabulary=size))
        found.append(jax.jit(terms)(params, frozen, batch)[1]["nll"].value)
    assert found[0] != found[1] and abs(found[0] - found[1]) < 0.2 * found[0]
    rows = small.Responses(TOKENS, np.array([5, 5]))
    setting = Setting(target, Tokenizer(None, Path(), VOCAB), 2, rows, rows, DataConfig(length=30), Path())
    task = make_task(config, setting, graph, model.config, (None, None))
    whole = make_task(dataclasses.replace(config, vocabulary=0), setting, graph, model.config, (None, None))
    state = init_state(params, optax.identity())
    assert task.evaluate(state)["held_out_nll"] == whole.evaluate(state)["held_out_nll"]


@pytest.mark.parametrize("size", [60, 200, 500])
def test_sizes_that_are_refused(size):
    with pytest.raises(InputError, match="give more than the 60 of its rows, fewer than the model's 200"):
        sample_vocabulary(jax.random.key(0), jnp.asarray(TOKENS), size, VOCAB)


def test_the_second_stage_compares_whole_distributions(models):
    target, model = models
    (graph, params), (target_graph, frozen) = nnx.split(model), nnx.split(target)
    config = dataclasses.replace(small.CONFIG, loss="opd", vocabulary=150)
    batch = {"tokens": TOKENS, "mask": np.ones(TOKENS.shape, bool), "step": np.uint32(7)}
    with pytest.raises(InputError, match="give vocabulary 0"):
        jax.eval_shape(functools.partial(drafter_terms, (graph, target_graph), config), params, frozen, batch)
