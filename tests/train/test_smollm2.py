"""What the run for SmolLM2 starts from; the run itself takes hours."""

import gzip
import json

from train.configuration import read_config
from train.run import DrafterRun
from train.smollm2.__main__ import CONFIG, PROMPTS, RESPONSES
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
    assert len({line["id"] for line in lines}) == len(lines) > 0.9 * 2 * PROMPTS
    for line in lines:
        tokens, prompt = line["tokens"], line["prompt"]
        assert 0 < prompt <= run.regenerate.longest
        assert 0 < len(tokens) - prompt <= run.regenerate.response
        assert all(0 <= token < VOCAB for token in tokens)
        assert (tokens[-1] == END) == (line["finish_reason"] == "stop")


def test_prompts_are_the_same_every_time_and_of_both_kinds():
    prompts = make_prompts(20, 20)
    assert prompts == make_prompts(20, 20) and prompts != make_prompts(20, 20, seed=1)
    assert len(prompts) == 40 and len({json.dumps(prompt) for prompt in prompts}) == 40
    texts = [prompt.get("prompt") or prompt["messages"][0]["content"] for prompt in prompts]
    assert sum("def " in text or "Python" in text for text in texts) >= 20
    assert 5 < sum("messages" in prompt for prompt in prompts) < 35
