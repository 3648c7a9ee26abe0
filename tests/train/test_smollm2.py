"""What the run for SmolLM2 starts from; the run itself takes hours."""

import ast
import dataclasses
import gzip
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dflash_jax.checkpoints import load_drafter
from dflash_jax.config import TargetConfig
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of
from dflash_jax.pair import check_fit
from train.command import command
from train.configuration import read_config
from train.records import JsonLines
from train.run import DrafterRun
from train.smollm2 import __main__ as script
from train.smollm2.__main__ import HERE, PROMPTS, RESPONSES
from train.smollm2.functions import make_function
from train.smollm2.prompts import make_prompts

VOCAB, END = 49152, 2
TARGET = TargetConfig.from_dict({
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "rope_theta": 100000.0,
})  # fmt: skip


@pytest.mark.parametrize("on", ["cpu", "gpu"])
def test_the_configurations_have_room_for_every_text_and_a_drafter_to_ship(on):
    run = read_config(DrafterRun, HERE / f"{on}.yaml", ["data.responses=[responses.jsonl]"])
    training = run.training
    assert not training.vocabulary or training.batch * run.data.length < training.vocabulary < VOCAB
    assert run.regenerate.longest + run.regenerate.response <= run.data.length
    shapes = shapes_of(lambda rngs: Drafter(training.architecture.drafter_config(TARGET, run.mask_token), rngs=rngs))
    assert 15e6 < 2 * sum(x.size for x in jax.tree.leaves(nnx.state(shapes))) < 25e6  # bytes in bfloat16


def test_responses_fit_the_run():
    run = read_config(DrafterRun, HERE / "cpu.yaml")
    lines = [json.loads(line) for line in gzip.decompress(RESPONSES.read_bytes()).splitlines()]
    assert len({line["id"] for line in lines}) == len(lines) > 0.9 * sum(PROMPTS["cpu"].values())
    for line in lines:
        tokens, prompt = line["tokens"], line["prompt"]
        assert 0 < prompt <= run.regenerate.longest
        assert 0 < len(tokens) - prompt <= run.regenerate.response
        assert all(0 <= token < VOCAB for token in tokens)
        assert (tokens[-1] == END) == (line["finish_reason"] == "stop")


def test_the_drafter_that_comes_along_is_that_of_the_run():
    config, drafter = load_drafter(HERE / "drafter")
    run = read_config(DrafterRun, HERE / "gpu.yaml")
    target = dataclasses.replace(TARGET, rms_norm_eps=float(np.float32(TARGET.rms_norm_eps)))  # as its file has it
    assert config == run.training.architecture.drafter_config(target, run.mask_token)
    check_fit(TARGET, config)
    assert all(np.isfinite(x).all() and x.std() > 0 for x in jax.tree.leaves(nnx.state(drafter)) if x.size > 1)
    assert (HERE / "drafter" / "model.safetensors").stat().st_size < 25e6


@pytest.mark.parametrize("on", ["cpu", "gpu"])
def test_each_run_gets_its_prompts_or_responses(on, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "find_file", Path)
    monkeypatch.setattr(script, "convert", lambda file, folder: folder.mkdir(parents=True))
    monkeypatch.setitem(PROMPTS, "gpu", {"library": 3, "maths": 1, "functions": 2, "more_maths": 1})
    seen = []
    monkeypatch.setattr(script, "train", lambda *given, check: seen.append((given, check)) or 0)
    with pytest.raises(SystemExit):
        script.main(script.SmolLM2(on=on, changes=("training.loop.steps=7",)))
    (((what, config, changes), check),) = seen
    run = read_config(DrafterRun, Path(config), changes)
    assert what == "drafter" and not check and run.training.loop.steps == 7
    given = run.data.responses if on == "cpu" else run.data.prompts
    assert len(JsonLines(given)) == (7 if on == "gpu" else 4156)


def test_the_target_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "find_file", Path)
    monkeypatch.setattr(script, "convert", lambda file, folder: folder.mkdir(parents=True))
    monkeypatch.setattr(script, "train", lambda *given, check: pytest.fail("nothing is to be trained"))
    script.main(script.SmolLM2(only_target=True))
    assert capsys.readouterr().out == "done: runs/smollm2/target\n" and Path("runs/smollm2/target").is_dir()


def test_its_help_says_what_the_options_mean(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "--help"])
    with pytest.raises(SystemExit):
        command(script.SmolLM2, script.main)
    assert "\n    changes: to the run, as training.loop.steps=100\n" in capsys.readouterr().out


def test_prompts_are_the_same_every_time_and_of_all_kinds():
    prompts = make_prompts(20, 20, 30, 10)
    assert prompts == make_prompts(20, 20, 30, 10) and prompts != make_prompts(20, 20, 30, 10, seed=1)
    assert len(prompts) == 80 and len({json.dumps(prompt) for prompt in prompts}) == 80
    texts = [prompt.get("prompt") or prompt["messages"][0]["content"] for prompt in prompts]
    assert sum("def " in text or "Python" in text for text in texts[:40]) >= 20
    assert sum("def " in text for text in texts[40:]) == 30
    assert 5 < sum("messages" in prompt for prompt in prompts[:40]) < 35


def test_made_up_functions_are_python_with_examples():
    rng = np.random.default_rng(0)
    for _ in range(300):
        head = make_function(rng)
        module = ast.parse(head)
        name, text = module.body[-1].name, ast.get_docstring(module.body[-1])
        assert head.startswith("from typing import List") == ("List[" in head)
        assert text.count(f"{name}(") == 2 or text.count("the output should be") == 2
        assert not re.search(r"[{}]|,,|,\.", text.splitlines()[0])


def test_examples_are_true():
    found = {}
    for seed in range(4000):
        head = make_function(np.random.default_rng(seed))
        name = re.search(r"def (\w+)", head)[1]
        found.setdefault(name, re.findall(rf"{name}\((.*)\)(?: == |\n    )(.*)", head))
    for x, y in found["sum_even_squared"]:
        assert sum(n * n for n in ast.literal_eval(x) if n % 2 == 0) == ast.literal_eval(y)
    for x, y in found["word_lengths"]:
        assert [len(word) for word in ast.literal_eval(x).split()] == ast.literal_eval(y)
