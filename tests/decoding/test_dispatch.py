"""A dispatch of rounds has no host in it, and nothing is compiled twice."""

import logging
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from dflash_jax.decoding import run as run_module
from dflash_jax.decoding.generate import generate
from dflash_jax.decoding.run import MANY, Run, rounds_for
from tests.decoding import pairs

NEW = 20
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.2}
run_rounds = rounds_for(2)
HOST = re.compile("callback|infeed|outfeed|stablehlo.send|stablehlo.recv")


def begin(settings):
    """The arguments of the first dispatch, all on the device."""
    run = Run(pairs.pair("qwen3_5_moe"), pairs.prompts([3, 9]), NEW, settings, (), True, None)
    state = run_module.prefill(run.graph, run.weights, *run.inputs, run.sampling, run.width, run.chunk)
    return run.graph, run.weights, state, run.sampling, jax.device_put(np.int32(6)), run.width


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_no_transfer_inside_a_dispatch(settings):
    """The guard refuses transfers; on the CPU, where reading an array moves nothing, the program's text tells."""
    arguments = begin(settings)
    assert not HOST.search(run_rounds.lower(*arguments).as_text())
    with jax.transfer_guard("disallow"):
        state = jax.block_until_ready(run_rounds(*arguments))
    assert np.all(np.asarray(state.rounds) >= 5)


def test_a_transfer_would_be_seen(monkeypatch):
    *arguments, rounds, width = begin({})
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run_rounds(*arguments, np.asarray(rounds), width)
    right = run_module.decode_round

    def peeping(target, drafter, state, *rest):
        jax.debug.callback(lambda known: None, state.known)
        return right(target, drafter, state, *rest)

    monkeypatch.setattr(run_module, "decode_round", peeping)
    run_rounds.clear_cache()
    text = run_rounds.lower(*arguments, rounds, width).as_text()
    run_rounds.clear_cache()
    assert HOST.search(text)


def test_the_host_sees_one_dispatch_when_it_looks_for_no_text(states):
    generate(pairs.pair("qwen3_5_moe"), pairs.prompts([3, 9]), max_new_tokens=NEW)
    assert len(states) == 1


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_nothing_is_compiled_again(settings, caplog):
    """For prompts of other lengths in the bucket, other values of the settings, other stops, other output lengths."""
    pair = pairs.pair("qwen3_5_moe")

    def compilations(lengths, new, **changes):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            generate(pair, pairs.prompts(lengths), max_new_tokens=new, **{**settings, **changes})
        return [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]

    run_rounds.clear_cache()
    assert any("run_rounds" in text for text in compilations([3, 9], NEW))
    compilations([33, 9], NEW)  # prompts that are all short have a prefill of their own
    assert not compilations([9, 32], NEW)
    assert not compilations([1, 130], NEW + 7)
    assert not compilations([200, 2], 3, stop=[2, 4])
    if settings:
        assert not compilations([4, 4], NEW, temperature=[0.0, 2.0], top_k=3, seed=[7, 8])


def test_many_sequences_have_a_program_of_their_own():
    """With XLA's other products on a CPU; each sequence gets the tokens it gets alone."""
    assert rounds_for(MANY - 1) is run_rounds is not rounds_for(MANY)
    pair, prompts = pairs.pair("qwen3_5_moe"), pairs.prompts(list(range(1, MANY + 1)))
    rounds_for(MANY).clear_cache()
    together = generate(pair, prompts, max_new_tokens=NEW)
    assert rounds_for(MANY)._cache_size() == 1
    assert [one.tokens for one in together] == [generate(pair, [p], max_new_tokens=NEW)[0].tokens for p in prompts]


def test_positions_are_turned_into_angles_once_for_all_layers():
    """XLA for the CPU would make a cosine for every element of every head in every layer."""
    run = Run(pairs.pair("qwen3"), pairs.prompts([3, 9]), NEW, {}, (), True, None)
    state = run_module.prefill(run.graph, run.weights, *run.inputs, run.sampling, run.width, run.chunk)
    text = run_rounds.lower(run.graph, run.weights, state, run.sampling, np.int32(6), run.width).compile().as_text()
    layers = run.pair.target.config.num_layers + run.pair.drafter.config.num_layers
    assert 0 < text.count(" cosine(") <= 3 < layers  # of the block's rows twice, and of the rows to be committed


def test_weights_are_plain_arrays():
    """What jax has to take apart at every call."""
    leaves = jax.tree.leaves(pairs.pair("qwen3_5_moe").split[1], is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert {type(leaf) for leaf in leaves} == {type(jax.numpy.ones(1))}


def test_the_models_description_is_hashed_once(monkeypatch):
    """It is an argument of every call; equal pairs still share their programs."""
    pair, again = (replace(pairs.pair("qwen3_5_moe")) for _ in range(2))
    assert pair.split[0] == again.split[0] and hash(pair.split[0]) == hash(again.split[0])
    monkeypatch.setattr(nnx.GraphDef, "__hash__", lambda self: 1 / 0)
    assert hash(pair.split[0]) == hash(again.split[0])
    assert type(nnx.merge(*pair.split)[0]) is type(pair.target)
