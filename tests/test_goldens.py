"""The recorded runs of the reference implementation: every recorded round, and whole outputs. No torch."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import dflash_jax
from dflash_jax.cache import DrafterCache, KeyValues
from dflash_jax.decoding import proposal
from dflash_jax.decoding.generate import generate
from dflash_jax.decoding.run import rounds_for
from dflash_jax.models.target import Target

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE, RECORDED = 1e-4, 4


@pytest.fixture(
    scope="module", params=["dflash_full", "dflash_sliding", "dflash2", "zlab_dflash2_names", "zlab_mask_embedding"]
)
def case(request):
    folder = GOLDENS / request.param
    expected = load_file(folder / "expected.safetensors")
    pair = dflash_jax.load(folder / "target", folder / "drafter")
    return SimpleNamespace(pair=pair, expected=expected, prompt=expected["prompt"], tokens=expected["tokens"])


@partial(jax.jit, static_argnames="config")
def commit(drafter, config, cache, taps, length):
    # Padding rows, as every chunk and every round has them; only the first `len(taps)` count.
    padded = jnp.pad(taps, ((0, 24 - len(taps)), (0, 0)), constant_values=7.0)[None]
    return cache.commit(drafter.context(padded, length), length, jnp.full(1, len(taps)))


@jax.jit
def draft(target, drafter, block, cache, length):
    hidden = drafter(drafter.embed(target, block[None]), cache, length)[:, 1:]
    proposed = proposal.propose(target, drafter, block[:1], cache, length, None, block.shape[0])
    return hidden[0], drafter.head(target.head)(hidden)[0], proposed.tokens[0]


def test_every_recorded_round(case):
    target, drafter = case.pair.target, case.pair.drafter
    cache = DrafterCache.empty(drafter.config, 1, 48, jnp.float32)
    length = jnp.zeros(1, jnp.int32)
    for i in range(RECORDED):
        record = {
            key: case.expected[f"round{i}.{key}"] for key in ("target_hidden", "block", "hidden", "logits", "draft")
        }
        cache = commit(drafter, drafter.config, cache, record["target_hidden"], length)
        length = length + len(record["target_hidden"])
        hidden, logits, tokens = draft(target, drafter, jnp.asarray(record["block"]), cache, length)
        np.testing.assert_allclose(hidden, record["hidden"], atol=TOLERANCE)
        np.testing.assert_allclose(logits, record["logits"], atol=TOLERANCE)
        np.testing.assert_array_equal(tokens, record["draft"])
    assert_nothing_beyond(cache.layers, length)


def test_taps_of_the_target_are_those_recorded(case):
    rows = np.concatenate([case.expected[f"round{i}.target_hidden"] for i in range(RECORDED)])
    sequence = jax.jit(partial(Target.sequence, tap_ids=case.pair.drafter.config.tap_ids))
    taps = sequence(case.pair.target, jnp.asarray(case.tokens[None, : len(rows)])).taps[0]
    assert np.std(rows) > 0.1
    np.testing.assert_allclose(taps, rows, atol=TOLERANCE)


def test_output_and_acceptance_lengths(case):
    new = len(case.tokens) - len(case.prompt)
    (got,) = generate(case.pair, [case.prompt.tolist()], max_new_tokens=new)
    assert got.tokens == case.tokens[len(case.prompt) :].tolist()
    assert got.acceptance_lengths == up_to(case.expected["acceptance_lengths"].tolist(), new - 1)


def test_plain_output_is_the_same(case):
    new = len(case.tokens) - len(case.prompt)
    (got,) = generate(case.pair, [case.prompt.tolist()], max_new_tokens=new, draft=False)
    assert got.tokens == case.tokens[len(case.prompt) :].tolist()
    assert got.acceptance_lengths == [1] * (new - 1)


def test_the_drafter_keeps_accepted_rows_only(case, monkeypatch):
    """In rounds that reject most of what was drafted."""
    states = []
    rounds = lambda *arguments: states.append(rounds_for(1)(*arguments)) or states[-1]  # noqa: E731
    monkeypatch.setattr("dflash_jax.decoding.run.rounds_for", lambda sequences: rounds)
    new = len(case.tokens) - len(case.prompt)
    generate(case.pair, [case.prompt.tolist()], max_new_tokens=new)
    (state,) = states
    assert state.cache.lengths[0] >= len(case.tokens) - 1
    assert_nothing_beyond(state.draft_cache.layers, state.cache.lengths)


def test_rows_past_the_committed_length_are_never_read(case, monkeypatch):
    """The target's rejected rows stay in its cache until the next block overwrites them."""

    def rounds(graph, weights, state, *arguments):
        beyond = np.arange(state.tokens.shape[1])[:, None] >= np.asarray(state.cache.lengths)[0]
        layers = jax.tree.map(lambda rows: jnp.where(beyond, 1e4, rows), state.cache.layers)
        state = replace(state, cache=replace(state.cache, layers=layers))
        return rounds_for(1)(graph, weights, state, *arguments)

    monkeypatch.setattr("dflash_jax.decoding.run.rounds_for", lambda sequences: rounds)
    test_output_and_acceptance_lengths(case)


def up_to(lengths: list[int], left: int) -> list[int]:
    """The lengths as far as they are output: the reference's last round may run past the end."""
    kept = []
    for length in lengths:
        if left > 0:
            kept.append(min(length, left))
            left -= length
    return kept


def assert_nothing_beyond(layers: tuple[KeyValues, ...], lengths) -> None:
    for layer in layers:
        for rows in (np.asarray(layer.keys)[0], np.asarray(layer.values)[0]):
            assert np.all(np.any(rows[:, : int(lengths[0])], axis=-1))
            assert not np.any(rows[:, int(lengths[0]) :])
