"""Prompts that the target makes up: whole messages of the template's form, different ones, the same after a stop."""

import dataclasses
import shutil

import pytest

import dflash_jax
from dflash_jax.errors import InputError
from dflash_jax.text import load_tokenizer
from tests.train import runs
from train import regenerate as module
from train.data import DataConfig
from train.own_prompts import around_a_message, make_own_prompts
from train.records import JsonLines
from train.regenerate import RegenerateConfig
from train.responses import make_responses

OPENINGS = ("", "Red ")
CONFIG = RegenerateConfig(own_prompts=48, own_openings=OPENINGS, longest=100, response=5, batch=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.target_folder(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def pair(folder):
    return dflash_jax.load(str(folder))


@pytest.fixture(scope="module")
def made(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return make_own_prompts(pair, CONFIG, {}, folder), folder


def test_they_are_different_messages_between_what_the_template_writes_around_one(pair, made):
    prompts, _ = made
    texts = [pair.tokenizer.core.decode(prompt, skip_special_tokens=False) for prompt in prompts]
    assert 2 < len(set(texts)) == len(texts) <= CONFIG.own_prompts
    for text, prompt in zip(texts, prompts, strict=True):
        assert text.startswith("<|start|>user\n") and text.endswith("<|end|>\n<|start|>assistant\n")
        assert text.count("<|end|>") == 1 and len(prompt) <= CONFIG.longest
    begun = [text.removeprefix("<|start|>user\n").startswith("Red ") for text in texts]
    assert any(begun) and not all(begun)


def test_a_stopped_run_goes_on_to_the_same_ones(pair, made, tmp_path, monkeypatch):
    prompts, folder = made
    shutil.copytree(folder, tmp_path / "again")
    (tmp_path / "again" / "000001.jsonl").unlink()
    written, real = [], module.write_batch
    monkeypatch.setattr(module, "write_batch", lambda *given: written.append(1) or real(*given))
    assert make_own_prompts(pair, CONFIG, {}, tmp_path / "again") == prompts
    assert written == [1]


def test_they_are_answered_beside_the_prompts_that_are_given(folder, made, tmp_path):
    given = runs.prompts_file(tmp_path / "prompts.jsonl", 3)
    assert make_responses(str(folder), tmp_path, DataConfig(prompts=(given,)), CONFIG, None)
    lines = JsonLines((tmp_path / "responses",))
    asked = [line["tokens"][: line["prompt"]] for line in map(lines.__getitem__, range(len(lines)))]
    assert len(asked) == 3 + len(made[0]) and all(prompt in asked for prompt in made[0])


def test_what_cannot_give_any_is_refused_in_one_line(pair, folder, tmp_path):
    with pytest.raises(InputError, match="longest is 20, and the chat template and the opening have"):
        make_own_prompts(pair, dataclasses.replace(CONFIG, longest=20), {}, tmp_path / "short")
    with pytest.raises(InputError, match="own_openings is empty; give how messages begin"):
        make_own_prompts(pair, dataclasses.replace(CONFIG, own_openings=()), {}, tmp_path / "none")
    with pytest.raises(InputError, match="none of 1 messages that the target began ended within 1 tokens"):
        few = dataclasses.replace(CONFIG, own_prompts=1, own_openings=("",), longest=20)
        make_own_prompts(pair, few, {}, tmp_path / "few")
    runs.tokenizer("{{ messages[0]['content'] }}").save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="with nothing to begin or to end it; give data"):
        around_a_message(load_tokenizer(tmp_path / "bare"), {})
    with pytest.raises(InputError, match=r"give JSONL files of texts or chat messages to answer, or regenerate\.own"):
        make_responses(str(folder), tmp_path, DataConfig(), dataclasses.replace(CONFIG, own_prompts=0), None)
