"""What the run for SmolLM2 starts from; the run itself takes hours."""

import ast
import gzip
import json
import re

import numpy as np

from train.configuration import read_config
from train.run import DrafterRun
from train.smollm2.__main__ import CONFIG, PROMPTS, RESPONSES
from train.smollm2.functions import make_function
from train.smollm2.prompts import make_prompts

VOCAB, END = 49152, 2


def test_the_configuration_can_be_read():
    run = read_config(DrafterRun, CONFIG, ["data.responses=[responses.jsonl]"])
    training = run.training
    assert training.batch * run.data.length < training.vocabulary < VOCAB  # room for all tokens of a step
    assert run.regenerate.longest + run.regenerate.response <= run.data.length


def test_responses_fit_the_run():
    run = read_config(DrafterRun, CONFIG)
    lines = [json.loads(line) for line in gzip.decompress(RESPONSES.read_bytes()).splitlines()]
    assert len({line["id"] for line in lines}) == len(lines) > 0.9 * sum(PROMPTS.values())
    for line in lines:
        tokens, prompt = line["tokens"], line["prompt"]
        assert 0 < prompt <= run.regenerate.longest
        assert 0 < len(tokens) - prompt <= run.regenerate.response
        assert all(0 <= token < VOCAB for token in tokens)
        assert (tokens[-1] == END) == (line["finish_reason"] == "stop")


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
