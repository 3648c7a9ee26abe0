"""Log-probabilities, least lengths and structured output over HTTP, as OpenAI's client sees them."""

import json
import math
import re

import numpy as np
import openai
import pytest

from serve.requests import Request
from tests.serve.servers import MODEL

PROMPT = "def fibonacci(n):"
MESSAGES = [{"role": "user", "content": "import os"}]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_completion_s_log_probabilities_are_those_of_the_target(served, client):
    (choice,) = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0, logprobs=3, echo=True
    ).choices
    found, pair = choice.logprobs, served.engine.pair
    tokens = served.engine.submit(Request(PROMPT, max_new_tokens=20)).result().tokens
    ids = pair.tokenizer.encode(PROMPT)
    logits = np.asarray(pair.logits(np.array([ids + tokens])))[0, len(ids) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.token_logprobs[len(ids) :], expected[np.arange(20), tokens], atol=1e-4)
    tops = found.top_logprobs[len(ids) :]
    assert all(len(top) == 3 for top in tops)
    np.testing.assert_allclose([max(top.values()) for top in tops], expected.max(-1), atol=1e-4)
    for text, offset in zip(found.tokens, found.text_offset, strict=True):
        assert choice.text[offset:].startswith(text)


def test_a_stream_has_the_log_probabilities_of_the_whole_answer(client):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=2).choices[0]
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, top_logprobs=2, stream=True)]
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    assert [(e.token, e.logprob, e.bytes, e.top_logprobs) for e in entries] == [
        (e.token, e.logprob, e.bytes, e.top_logprobs) for e in whole.logprobs.content
    ]
    assert len(entries) == 20 and all(len(e.top_logprobs) == 2 and e.logprob <= 0 for e in entries)
    assert bytes(b for e in entries for b in e.bytes or ()).decode() == whole.message.content
    (none,) = client.chat.completions.create(**asked).choices
    assert all(e.top_logprobs == [] and math.isfinite(e.logprob) for e in none.logprobs.content)


def test_min_tokens(served, client):
    stop = served.engine.submit(Request(PROMPT, max_new_tokens=4)).result().tokens[2]
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    short = client.completions.create(**asked, extra_body={"stop_token_ids": [stop]})
    long = client.completions.create(**asked, extra_body={"stop_token_ids": [stop], "min_tokens": 8})
    assert short.usage.completion_tokens == 3 and long.usage.completion_tokens >= 8


def test_a_schema_an_expression_and_a_choice(client):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 120, "temperature": 0}
    form = {"type": "json_schema", "json_schema": {"name": "ab", "schema": schema, "strict": True}}
    (choice,) = client.chat.completions.create(**asked, response_format=form).choices
    value = json.loads(choice.message.content)
    assert value["a"] in (1, 2) and isinstance(value["b"], bool) and choice.finish_reason == "stop"

    def structured(**kind) -> str:
        made = client.chat.completions.create(**asked, extra_body={"structured_outputs": kind})
        return made.choices[0].message.content

    assert re.fullmatch(r"[xyz]{3}-\d\d", structured(regex=r"[xyz]{3}-[0-9][0-9]"))
    assert structured(choice=["left (1)", 'say "no"']) in ("left (1)", 'say "no"')
    assert structured(grammar='start: "a" "b"+ "c"').startswith("ab")
