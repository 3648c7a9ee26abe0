"""Input that cannot work is refused before anything is computed, in one line that says what to give instead.

Configurations and tensors are refused in test_config.py and checkpoints/test_refusals.py, texts in test_text.py.
"""

import dataclasses

import jax
import numpy as np
import pytest

import dflash_jax
from dflash_jax import InputError, cli
from dflash_jax.pair import check_fit
from tests.checkpoints.folders import change_config, drafter_folder, target_folder
from tests.decoding import pairs


def refused(message, call, *arguments, **options):
    with pytest.raises(InputError, match=message) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "the drafter's hidden size is 64 and the target's is 32; give the target's own drafter"),
        ({"vocab_size": 7}, "the drafter's vocabulary is 7 and the target's is 6"),
        ({"num_target_layers": 4}, "the drafter's number of target layers is 4 and the target's is 3"),
        ({"tap_ids": (0, 3)}, r"the drafter taps layers \[0, 3\]; the target's layers are 0 to 2"),
        ({"tap_ids": (-1, 2)}, r"the drafter taps layers \[-1, 2\]"),
        ({"mask_token_id": 6}, "the drafter's mask token is 6; the target's tokens are 0 to 5"),
    ],
)
def test_a_drafter_for_another_target(changes, message):
    pair = pairs.pair("llama")
    check_fit(pair.target.config, pair.drafter.config)
    refused(message, check_fit, pair.target.config, dataclasses.replace(pair.drafter.config, **changes))


def test_folders_are_checked_as_they_are_loaded(tmp_path):
    target_folder(tmp_path / "target", "llama")
    drafter_folder(tmp_path / "drafter", "dflash")  # for a target of eight layers
    load, target, drafter = dflash_jax.load, tmp_path / "target", tmp_path / "drafter"
    refused("number of target layers is 8 and the target's is 4", load, target, drafter)
    refused("is not a drafter, supported are DFlashDraftModel", load, target, target)
    refused("that of a DFlash drafter, a target is needed", load, drafter)
    refused("drafter .*/nowhere is not a folder; give a checkpoint folder", load, target, tmp_path / "nowhere")
    refused("a drafter was given without its target", load, None, drafter)
    refused("the mesh is a dict; give a jax Mesh", load, target, mesh={"tensor": 2})
    (target / "model.safetensors").write_bytes((target / "model.safetensors").read_bytes()[:-9])
    refused("model.safetensors is cut short", load, target)
    change_config(target, lambda c: c | {"model_type": "mamba"})
    refused("model_type 'mamba' .* is not supported; supported targets are llama", load, target)
    change_config(target, lambda c: c | {"model_type": "llama", "logit_scale": 2.0})
    refused("not understood: logit_scale", load, target)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "the prompt is empty; give at least one token"),
        ([[1], []], "the prompt is empty"),
        ([[1, 6]], "token id 6 is outside the model's vocabulary; ids are 0 to 5"),
        ([[1, -1]], "token id -1 is outside"),
        ([[1, 2.5]], "a prompt is text, token ids or chat messages; this one holds a float"),
        ("text", "has no tokenizer.json; give the prompt as token ids"),
        ([[1] * 512], "a prompt has 512 tokens and the model takes 512; give at most 511"),
        ([[1], [1] * 700], "a prompt has 700 tokens and the model takes 512"),
        (7, "prompts are a int; give a text, token ids, chat messages, or a list of such"),
        (None, "prompts are a NoneType"),
    ],
)
def test_prompts(prompts, message):
    refused(message, dflash_jax.generate, pairs.pair("llama"), prompts, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"width": 0}, "width is 0; give a whole number from 1 to 4, the drafter's block size"),
        ({"width": 5}, "width is 5; give a whole number from 1 to 4"),
        ({"width": 2.0}, "width is 2.0"),
        ({"width": 3, "draft": False}, "width is 3, and there is no drafter at work"),
        ({"stop": [6]}, "stop holds 6; give texts of at least one character, or ids from 0 to 5"),
        ({"stop": -1}, "stop holds -1"),
        ({"stop": ""}, "stop holds ''"),
        ({"stop": None}, "stop holds None"),
        ({"stop": [True]}, "stop holds True"),
        ({"stop": 1.5}, "stop holds 1.5"),
        ({"stop": "end"}, "stop strings need a tokenizer"),
        ({"temperature": -0.1}, "temperature is -0.1; give a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -1}, "top_k is -1; give an integer from 0"),
        ({"top_p": 0}, r"top_p is 0; give a number in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2}, r"min_p is 2; give a number in \[0, 1\]"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"seed": -1}, "seed is -1; give an integer from 0 to 4294967295"),
        ({"logit_bias": {6: 1.0}}, "logit_bias names token 6; give ids from 0 to 5"),
        (
            {"temperature": [1, 1, 1]},
            "temperature has 3 entries for 2 requests; give one value, or one for each request",
        ),
    ],
)
def test_settings(options, message):
    pair, prompts = pairs.pair("llama"), [[1, 2], [3]]
    refused(message, dflash_jax.generate, pair, prompts, **({"max_new_tokens": 4} | options))
    if "entries" not in message:
        refused(message, dflash_jax.stream, pair, prompts[0], **({"max_new_tokens": 4} | options))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], r"tokens have shape \(2,\)"),
        (np.zeros((1, 0), int), r"tokens have shape \(1, 0\)"),
        ([[0.5]], "dtype float64; give integer ids"),
        ([[0, 6]], "tokens hold ids from 0 to 6; ids are 0 to 5"),
        (np.zeros((1, 513), int), "tokens are 513 long and the model takes 512"),
    ],
)
def test_tokens_of_logits(tokens, message):
    refused(message, pairs.pair("llama").logits, tokens)


def test_a_check_comes_before_weights_and_sees_what_they_will_be(monkeypatch):
    """`load` calls it with shapes; with what it raises, no weight is read."""
    seen = []
    pair = dflash_jax.load(check=seen.append)
    outlined, loaded = (jax.tree.leaves(one.split[1]) for one in (seen[0], pair))
    for x, y in zip(outlined, loaded, strict=True):
        assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
    monkeypatch.setattr("dflash_jax.checkpoints.fill._read_leaf", lambda *_: pytest.fail("weights are read"))
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"width": 99}, "width is 99"),
        ({"top_p": 7.0}, "top_p is 7.0"),
        ({"stop": [10**6]}, "stop holds 1000000"),
    ):
        with pytest.raises(InputError, match=message):
            dflash_jax.load(check=lambda outline, options=options: dflash_jax.stream(outline, "x", **options))
    too_long = "x = 1\n" * 4000
    with pytest.raises(InputError, match=r"a prompt has \d+ tokens and the model takes"):
        dflash_jax.load(check=lambda outline: dflash_jax.stream(outline, too_long))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["generate", "--prompt", "x", "--width", "99"], "width is 99"),
        (["serve", "--port", "0", "--max-length", "999999"], "max_length is 999999"),
        (["serve", "--port", "0", "--slots", "0"], "slots is 0"),
        (["serve", "--port", "0", "--memory-mib", "1"], "the memory budget is 1 MiB"),
        (["bench", "serve", "--ways", "3"], "a way of decoding is '3'"),
        (["bench", "serve", "--slots", "0"], "slots is 0"),
    ],
)
def test_commands_refuse_before_weights_are_read(command, message, monkeypatch, capsys):
    monkeypatch.setattr("dflash_jax.checkpoints.fill._read_leaf", lambda *_: pytest.fail("weights are read"))
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert err.count("dflash: ") == 1 and message in err
