"""OpenAI's own client against a real server: what it gets is what the engine gives, whole and streamed."""

import asyncio
import json

import openai
import pytest

from serve.requests import Request
from tests.serve import servers
from tests.serve.servers import MODEL, say

PROMPT = "def fibonacci(n):"
MESSAGES = [{"role": "system", "content": "Write Python."}, {"role": "user", "content": "import os"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    },
}

SIDES = ["left", "right (2)"]
PICK = {
    "type": "function",
    "function": {
        "name": "pick",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"side": {"enum": SIDES}},
            "required": ["side"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def direct(served, prompt, **settings):
    """The same from the engine."""
    return served.engine.submit(Request(prompt, **settings)).result()


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == (MODEL, "model", 512)
    assert model.dflash == {"chat": True, "widths": [1, 6]}
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'a/b'"):
        client.models.retrieve("a/b")


def test_a_completion_and_its_usage(served, client):
    got = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=60, temperature=0)
    expected = direct(served, PROMPT, max_new_tokens=60)
    (choice,) = got.choices
    assert (choice.text, choice.finish_reason) == (expected.text, "length")
    usage = got.usage
    assert usage.prompt_tokens == len(served.tokenizer.encode(PROMPT))
    assert (usage.completion_tokens, usage.total_tokens) == (60, usage.prompt_tokens + 60)
    lengths = expected.acceptance_lengths
    details = usage.completion_tokens_details
    drafted = details.accepted_prediction_tokens + details.rejected_prediction_tokens
    assert 0 <= drafted - 5 * len(lengths) <= 5 * 4  # rounds after the end, in the last dispatch
    assert sum(lengths) - len(lengths) - 5 <= details.accepted_prediction_tokens < drafted
    again = client.completions.create(model=MODEL, prompt=[300] * 40, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens == 0
    again = client.completions.create(model=MODEL, prompt=[300] * 40, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens == 32


def test_defaults_are_openais(client):
    """16 tokens if none of them ends the text, and sampled at temperature 1, each time anew."""
    sampled = [client.completions.create(model=MODEL, prompt=PROMPT) for _ in range(3)]
    for got in sampled:
        ended = got.choices[0].finish_reason == "stop"
        assert got.usage.completion_tokens == 16 or (ended and got.usage.completion_tokens < 16)
    assert len({got.choices[0].text for got in sampled}) > 1


def test_prompts_as_text_ids_and_lists(served, client):
    ids = served.tokenizer.encode(PROMPT), served.tokenizer.encode("import ")
    prompts = [PROMPT, ids[1], [PROMPT, "import "], list(ids)]
    answers = [client.completions.create(model=MODEL, prompt=p, temperature=0, max_tokens=12) for p in prompts]
    first, second = (direct(served, list(i), max_new_tokens=12).text for i in ids)
    assert [[c.text for c in a.choices] for a in answers] == [[first], [second], [first, second], [first, second]]
    assert answers[2].usage.prompt_tokens == len(ids[0]) + len(ids[1])


def test_n_choices_have_seeds_in_a_row(served, client):
    settings = {"temperature": 1.2, "top_p": 0.9, "frequency_penalty": 0.5}
    got = client.completions.create(
        model=MODEL,
        prompt=[PROMPT, "x"],
        n=3,
        seed=-2,
        max_tokens=20,
        extra_body={"top_k": 30, "min_p": 0.01},
        **settings,
    )
    settings |= {"top_k": 30, "min_p": 0.01, "max_new_tokens": 20}
    seeds = [2**32 - 2, 2**32 - 1, 0]
    expected = [direct(served, p, seed=seed, **settings) for p in (PROMPT, "x") for seed in seeds]
    assert [choice.text for choice in got.choices] == [one.text for one in expected]
    assert [choice.index for choice in got.choices] == list(range(6))
    assert len({one.text for one in expected}) > 3
    assert got.usage.completion_tokens == sum(len(one.tokens) for one in expected)
    assert got.usage.prompt_tokens == len(served.tokenizer.encode(PROMPT)) + len(served.tokenizer.encode("x"))


def test_a_stream_says_the_same(served, client):
    settings = {"prompt": [PROMPT, "import "], "n": 2, "seed": 5, "temperature": 1.0, "max_tokens": 40, "echo": True}
    whole = client.completions.create(model=MODEL, **settings)
    stream = client.completions.create(model=MODEL, stream=True, stream_options={"include_usage": True}, **settings)
    chunks = list(stream)
    assert servers.texts([c for chunk in chunks for c in chunk.choices], 4) == [c.text for c in whole.choices]
    assert whole.choices[2].text.startswith("import ")
    ends = [c for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(c.index for c in ends) == [0, 1, 2, 3]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    last = chunks[-1]
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 12  # it comes as it is made


def test_stop_strings_and_ids(served, client):
    full = direct(served, PROMPT, max_new_tokens=60)
    stop = full.text[30:36]
    for stream in (False, True):
        got = client.completions.create(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=60, stop=[stop, "never"], stream=stream
        )
        choices = [c for chunk in got for c in chunk.choices] if stream else got.choices
        assert "".join(c.text for c in choices) == full.text[: full.text.index(stop)]
        assert choices[-1].finish_reason == "stop"
    ids = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=60, extra_body={"stop_token_ids": [full.tokens[20]]}
    )
    assert ids.usage.completion_tokens == 1 + full.tokens.index(full.tokens[20])


def test_a_chat(served, client):
    got = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=24, user="me")
    (choice,) = got.choices
    ids = served.tokenizer.encode_rendered("<system>Write Python.\n<user>import os\n<assistant>")[0].tolist()
    assert got.usage.prompt_tokens == len(ids)
    assert choice.message.content == direct(served, ids, max_new_tokens=24).text
    assert (choice.message.role, choice.finish_reason, choice.message.tool_calls) == ("assistant", "length", None)
    parts = [{"role": "developer", "content": "Write Python."}, {"role": "user", "content": [
        {"type": "text", "text": "import"}, {"type": "text", "text": " os"}]}]  # fmt: skip
    stream = client.chat.completions.create(
        model=MODEL, messages=parts, temperature=0, max_completion_tokens=24, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content


def test_a_chat_goes_on_to_the_end_and_takes_options_of_the_template(served, client):
    got = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, extra_body={"chat_template_kwargs": {"enable_thinking": True}}
    )
    ids = served.tokenizer.encode_rendered("<system>Write Python.\n<user>import os\n<assistant think>")[0].tolist()
    assert got.choices[0].message.content == direct(served, ids, max_new_tokens=512).text
    assert got.usage.total_tokens <= 512


def test_a_character_in_several_tokens_comes_whole(served, client):
    """Two bytes, four bytes and a byte that never becomes a character."""
    settings = say(served.tokenizer, "é", "😀")
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, stream=True, **settings)
    pieces = [choice.text for chunk in stream for choice in chunk.choices if choice.text]
    assert "".join(pieces) == "é😀"
    assert all("\ufffd" not in piece for piece in pieces)
    got = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, **settings)
    assert got.choices[0].text == "é\ufffd"
    assert got.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("said", "content", "arguments"),
    [
        (servers.SAID[:8], "Sure.", ['{"a": 1, "b": "x y"}']),
        (servers.SAID[1:8], None, ['{"a": 1, "b": "x y"}']),
        (servers.SAID[8:12], None, ['{"a": 7, "b": "8"}']),
        (servers.SAID[:12], "Sure.", ['{"a": 1, "b": "x y"}', '{"a": 7, "b": "8"}']),
        ([servers.SAID[0], servers.SAID[12]], "Sure.\n<tool_call>oh no", []),
    ],
)
def test_tool_calls(served, client, said, content, arguments):
    settings = say(served.tokenizer, *said) | {"model": MODEL, "messages": MESSAGES, "tools": [ADD]}
    (choice,) = client.chat.completions.create(**settings).choices
    calls = choice.message.tool_calls or []
    assert choice.message.content == content
    assert [(c.type, c.function.name, c.function.arguments) for c in calls] == [
        ("function", "add", a) for a in arguments
    ]
    assert choice.finish_reason == ("tool_calls" if arguments else "stop")
    with client.chat.completions.stream(**settings) as stream:  # puts the parts together, and checks them
        final = stream.get_final_completion().choices[0]
    assert (final.message.content or None) == content
    assert [c.function.arguments for c in final.message.tool_calls or []] == arguments
    assert final.finish_reason == choice.finish_reason
    assert len({c.id for c in calls}) == len(calls)


@pytest.mark.parametrize(
    ("choice", "more", "reason"),
    [
        ({"type": "function", "function": {"name": "pick"}}, {}, "stop"),
        ("required", {"parallel_tool_calls": False}, "tool_calls"),
    ],
)
def test_a_call_that_has_to_come(served, client, choice, more, reason):
    tools = [ADD, PICK] if isinstance(choice, dict) else [PICK]
    settings = {"model": MODEL, "messages": MESSAGES, "tools": tools, "tool_choice": choice, "max_tokens": 100} | more
    (got,) = client.chat.completions.create(**settings, temperature=0).choices
    (call,) = got.message.tool_calls
    assert (got.message.content, got.finish_reason, call.function.name) == (None, reason, "pick")
    assert json.loads(call.function.arguments)["side"] in SIDES
    with client.chat.completions.stream(**settings, temperature=0) as stream:
        final = stream.get_final_completion().choices[0]
    assert [c.function.arguments for c in final.message.tool_calls] == [call.function.arguments]
    assert (final.message.content or None, final.finish_reason) == (None, reason)


THOUGHT = servers.SAID[13:17]


@pytest.mark.parametrize(
    ("aloud", "said", "thought"), [(False, THOUGHT, "hmm"), (True, THOUGHT[2:], "m"), (True, THOUGHT[1:2], "nk>\nhm")]
)
def test_thoughts_have_their_own_content(served, client, aloud, said, thought):
    settings = say(served.tokenizer, *said) | {"model": MODEL, "messages": MESSAGES}
    settings["extra_body"] |= {"chat_template_kwargs": {"aloud": aloud}}
    content = "Yes" if said[-1] == THOUGHT[-1] else ""
    message = client.chat.completions.create(**settings).choices[0].message
    assert (message.reasoning_content, message.content) == (thought, content)
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**settings, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == thought
    assert "".join(delta.content or "" for delta in deltas) == content
    app = servers.make_app(served.engine, reasoning=False)
    with servers.listening(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as plain:
        assert plain.chat.completions.create(**settings).choices[0].message.content == "".join(said)


def test_a_grammar_is_for_what_follows_the_thoughts(served, client):
    settings = say(served.tokenizer, *THOUGHT[2:]) | {"model": MODEL, "messages": MESSAGES}
    settings["extra_body"] |= {"chat_template_kwargs": {"aloud": True}, "structured_outputs": {"choice": ["Yes", "No"]}}
    (choice,) = client.chat.completions.create(**settings).choices
    assert (choice.message.reasoning_content, choice.message.content, choice.finish_reason) == ("m", "Yes", "stop")


def test_choices_of_one_prompt_share_its_prefill(served, client):
    served.wait_idle()
    before, prompt = served.engine.stats.prefill_tokens, [301] * 40
    client.completions.create(model=MODEL, prompt=prompt, n=4, max_tokens=2)
    assert served.engine.stats.prefill_tokens - before == 40 + 3 * 8


def test_tools_and_their_results_are_in_the_prompt(served, client):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    rendered = "<system>Write Python.\n<user>import os\n<assistant> add(2)\n<tool>3\n<assistant>"
    settings = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 10}
    plain = client.chat.completions.create(**settings)
    assert plain.usage.prompt_tokens == len(served.tokenizer.encode_rendered(rendered)[0])
    with_tools = client.chat.completions.create(tools=[ADD], **settings)
    assert with_tools.usage.prompt_tokens > plain.usage.prompt_tokens + 20
    without = client.chat.completions.create(tools=[ADD], tool_choice="none", **settings)
    assert without.usage.prompt_tokens == plain.usage.prompt_tokens
    assert without.choices[0].message.content == plain.choices[0].message.content


def test_tool_text_stays_text_where_no_tools_were_given(served, client):
    settings = say(served.tokenizer, *servers.SAID[:8])
    (choice,) = client.chat.completions.create(model=MODEL, messages=MESSAGES, **settings).choices
    assert choice.message.content == "".join(servers.SAID[:8])
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


def test_drafts_are_told_where_asked(served, client):
    settings = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 60, "stop": ["\n\n"]}
    assert not hasattr(client.completions.create(**settings).choices[0], "dflash")
    expected = direct(served, PROMPT, max_new_tokens=60, stop="\n\n")
    whole = client.completions.create(**settings, extra_body={"dflash": True}).choices[0]
    stream = client.completions.create(**settings, extra_body={"dflash": True}, stream=True)
    parts = [choice for chunk in stream for choice in chunk.choices]
    for part in parts:
        assert "".join(span["text"] for span in part.dflash["spans"]) == part.text
    told = {name: [x for p in parts for x in p.dflash[name]] for name in ("spans", "acceptance_lengths")}
    told |= {name: sum(p.dflash[name] for p in parts) for name in ("tokens", "drafted_tokens")}
    assert told == whole.dflash
    assert told["acceptance_lengths"] == expected.acceptance_lengths
    assert told["tokens"] == len(expected.tokens)
    assert told["drafted_tokens"] >= len(expected.tokens) - 1 - len(expected.acceptance_lengths) > 0
    assert {span["drafted"] for span in told["spans"]} == {True, False}
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=20, extra_body={"dflash": True}, stream=True
    )
    choices = [choice for chunk in chat for choice in chunk.choices]
    spans = [span["text"] for c in choices for span in getattr(c, "dflash", {"spans": []})["spans"]]
    assert "".join(spans) == "".join(c.delta.content or "" for c in choices)


def test_many_at_once_get_what_they_get_alone(served):
    prompts = [f"def f{i}(x):\n    return x" for i in range(12)]
    kinds = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.7, "seed": 8, "top_p": 0.8}]

    async def one(client, i):
        settings = {"model": MODEL, "prompt": prompts[i], "max_tokens": 20 + i, **kinds[i % 3]}
        if i % 2:
            return (await client.completions.create(**settings)).choices[0].text
        return "".join(
            [chunk.choices[0].text async for chunk in await client.completions.create(**settings, stream=True)]
        )

    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, i) for i in range(12)))

    got = asyncio.run(everyone())
    assert got == [direct(served, p, max_new_tokens=20 + i, **kinds[i % 3]).text for i, p in enumerate(prompts)]
    served.wait_idle()
