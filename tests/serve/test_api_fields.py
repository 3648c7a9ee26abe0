"""Fields of agents, benchmarks and other engines, over HTTP."""

import json

import numpy as np
import openai
import pytest

from serve.requests import Request
from tests.serve import servers
from tests.serve.servers import MODEL, say

PROMPT = "def fibonacci(n):"
MESSAGES = [{"role": "user", "content": "import os"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
NUMBERS = {
    "type": "object", "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip
STRICT = {"type": "function", "function": {"name": "add", "strict": True, "parameters": NUMBERS}}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, **body):
    return client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=body)


def test_the_first_call_alone(served, client):
    """Whole and streamed; what comes behind it is left out."""
    two = servers.SAID[:12]
    settings = say(served.tokenizer, *two) | {"model": MODEL, "messages": MESSAGES, "tools": [ADD]}
    both = client.chat.completions.create(**settings).choices[0].message
    assert len(both.tool_calls) == 2
    settings["parallel_tool_calls"] = False
    choice = client.chat.completions.create(**settings).choices[0]
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"a": 1, "b": "x y"}']
    assert (choice.message.content, choice.finish_reason) == ("Sure.", "tool_calls")
    with client.chat.completions.stream(**settings) as stream:
        final = stream.get_final_completion().choices[0]
    assert [call.function.arguments for call in final.message.tool_calls] == ['{"a": 1, "b": "x y"}']
    assert final.finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", [None, "auto"])
def test_strict_functions_are_called_as_their_schema_says(served, client, choice):
    """A model that wants to write other arguments cannot; one that does not call is free."""
    asked = {"model": MODEL, "messages": MESSAGES, "tools": [STRICT], "tool_choice": choice, "max_tokens": 150}
    asked = {name: value for name, value in asked.items() if value is not None}
    settings = say(served.tokenizer, *servers.SAID[:3])
    message = client.chat.completions.create(**settings, **asked).choices[0].message
    assert message.content == "Sure." and len(message.tool_calls) == 1
    arguments = json.loads(message.tool_calls[0].function.arguments)
    assert arguments.keys() == {"a", "b"} and arguments["a"] in (1, 22) and arguments["b"] in (True, False)
    settings = say(served.tokenizer, "\n<tool_call>oh no")
    message = client.chat.completions.create(**settings, **asked).choices[0].message
    assert "oh no" not in (message.content or "")
    settings = say(served.tokenizer, "Sure.")
    assert client.chat.completions.create(**settings, **asked).choices[0].message.content == "Sure."


def test_allowed_tools(served, client):
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]}
    (choice,) = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[other, STRICT], max_tokens=200, temperature=0,
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
    ).choices  # fmt: skip
    if choice.finish_reason != "length":
        assert {call.function.name for call in choice.message.tool_calls} == {"add"}
    alone = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[STRICT], max_tokens=1)
    some = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[other, STRICT], max_tokens=1,
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed | {"mode": "auto"}},
    )  # fmt: skip
    assert some.usage.prompt_tokens == alone.usage.prompt_tokens


def test_ignore_eos(served, client):
    settings = say(served.tokenizer, "Sure.")
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 9, "logit_bias": settings["logit_bias"], "temperature": 0}
    ended = client.completions.create(**asked, extra_body={"repetition_penalty": 1e6})
    assert (ended.usage.completion_tokens, ended.choices[0].finish_reason) == (2, "stop")
    on = client.completions.create(**asked, extra_body={"repetition_penalty": 1e6, "ignore_eos": True})
    assert (on.usage.completion_tokens, on.choices[0].finish_reason) == (9, "length")


def test_neutral_values(client):
    plain = complete(client).choices[0].text
    neutral = {
        "top_k": -1, "skip_special_tokens": True, "include_stop_str_in_output": False, "use_beam_search": False,
        "length_penalty": 1.0, "priority": 3, "request_id": "r", "add_special_tokens": True, "suffix": "", "n": 1.0,
        "truncate_prompt_tokens": 500.0, "verbosity": "low", "ignore_eos": False, "prompt_cache_options": {},
    }  # fmt: skip
    assert complete(client, **neutral).choices[0].text == plain
    chat = {
        "add_special_tokens": False, "add_generation_prompt": True, "continue_final_message": False, "echo": False,
        "include_reasoning": True, "separate_reasoning": True, "stream_reasoning": True, "functions": [],
        "reasoning_effort": "low", "enable_thinking": False, "best_of": 1,
    }  # fmt: skip
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    got = client.chat.completions.create(**asked, extra_body=chat).choices[0].message.content
    assert got == client.chat.completions.create(**asked).choices[0].message.content


def test_options_of_the_template_at_the_top_level(client):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1}
    top = client.chat.completions.create(**asked, extra_body={"enable_thinking": True}).usage.prompt_tokens
    nested = {"chat_template_kwargs": {"enable_thinking": True}}
    assert top == client.chat.completions.create(**asked, extra_body=nested).usage.prompt_tokens
    assert top > client.chat.completions.create(**asked).usage.prompt_tokens


def test_usage_in_every_chunk(client):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(**asked, stream_options=options))
    made = [chunk.usage.completion_tokens for chunk in chunks]
    assert made == sorted(made) and made[0] == 0 and made[-1] == 12 and len(set(made)) > 2
    assert len({chunk.usage.prompt_tokens for chunk in chunks}) == 1
    assert all(chunk.usage.total_tokens == chunk.usage.prompt_tokens + n for chunk, n in zip(chunks, made, strict=True))
    chunks = list(client.chat.completions.create(**asked, stream_options={"include_usage": True}))
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_token_ids(served, client):
    made = served.engine.submit(Request(PROMPT, max_new_tokens=12)).result().tokens
    prompt = served.tokenizer.encode(PROMPT)
    choice = complete(client, return_token_ids=True).choices[0]
    assert (choice.prompt_token_ids, choice.token_ids) == (prompt, made)
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    parts = list(client.completions.create(**asked, stream=True, extra_body={"return_token_ids": True}))
    assert parts[0].choices[0].prompt_token_ids == prompt and not hasattr(parts[1].choices[0], "prompt_token_ids")
    assert [token for part in parts for token in part.choices[0].token_ids] == made
    got = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, temperature=0, extra_body={"return_token_ids": True}
    )
    assert len(got.choices[0].token_ids) == 5 and len(got.prompt_token_ids) == got.usage.prompt_tokens


def test_the_end_of_a_prompt(served, client):
    prompt = served.tokenizer.encode(PROMPT)
    cut = complete(client, truncate_prompt_tokens=3, return_token_ids=True).choices[0]
    assert cut.prompt_token_ids == prompt[-3:]


def test_words_and_tokens_that_may_not_come(served, client):
    made = complete(client, return_token_ids=True).choices[0].token_ids
    word = next(text for text in servers.WORDS if served.tokenizer.encode(text)[0] in made)
    without = complete(client, bad_words=[word], return_token_ids=True).choices[0].token_ids
    assert served.tokenizer.encode(word)[0] not in without
    allowed = [made[0], 5]
    some = complete(client, allowed_token_ids=allowed, return_token_ids=True).choices[0].token_ids
    assert set(some) <= set(allowed) and len(some) == 12


def test_grammars_under_other_names(client):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    found = client.chat.completions.create(**asked, extra_body={"regex": "[xyz]{3}"}).choices[0].message.content
    assert len(found) == 3 and set(found) <= set("xyz")
    ebnf = 'root ::= "a" digit\ndigit ::= [0-9]'
    found = client.chat.completions.create(**asked, extra_body={"ebnf": ebnf}).choices[0].message.content
    assert found[0] == "a" and found[1:].isdigit()


def test_the_best_of_several(client):
    """By the mean log-probability of their tokens; the others are made, and paid for."""
    asked = {"model": MODEL, "prompt": [PROMPT, "import"], "max_tokens": 8, "seed": 5, "temperature": 1.5}
    every = client.completions.create(**asked, n=4, logprobs=0)
    best = client.completions.create(**asked, n=2, best_of=4)
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices)
    for prompt in range(2):
        ranked = sorted(every.choices[4 * prompt : 4 * prompt + 4], key=lambda c: -np.mean(c.logprobs.token_logprobs))
        assert [c.text for c in best.choices[2 * prompt : 2 * prompt + 2]] == [c.text for c in ranked[:2]]
    assert best.usage == every.usage or best.usage.completion_tokens == every.usage.completion_tokens


def test_prompts_with_another_salt_share_nothing(served, client):
    prompt = np.random.default_rng(3).integers(300, 370, 40).tolist()
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 2}

    def cached(salt):
        made = client.completions.create(**asked, extra_body={"cache_salt": salt})
        return made.usage.prompt_tokens_details.cached_tokens

    assert [cached(salt) for salt in ("a", "a", "b", "a", "b")] == [0, 32, 0, 32, 32]
