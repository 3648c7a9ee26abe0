"""Log-probabilities of prompts are those of the target, whatever pass a token was in."""

import threading

import numpy as np
import openai
import pytest

from dflash_jax.decoding.output import TokenLogprobs
from dflash_jax.text import REPLACEMENT
from serve.api import probabilities
from serve.requests import Request
from tests.decoding import pairs
from tests.serve import engines
from tests.serve.servers import MODEL

LENGTHS = [1, 2, 9, 16, 17, 45, 70]
PROMPTS = pairs.prompts(LENGTHS, seed=41)


def expected(pair, ids):
    """Return log-probabilities [T - 1, V] of what may follow each token but the last."""
    logits = np.asarray(pair.logits(np.array([ids])))[0, :-1].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check_scores(pair, ids, found, count):
    want = expected(pair, ids)
    assert len(found) == len(ids) - 1
    for row, token, one in zip(want, ids[1:], found, strict=True):
        np.testing.assert_allclose(one.logprob, row[token], atol=1e-4)
        assert len(one.top) == count
        np.testing.assert_allclose([value for _, value in one.top], np.sort(row)[::-1][:count], atol=1e-4)
        np.testing.assert_allclose([value for _, value in one.top], [row[token] for token, _ in one.top], atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss"])
def test_prompts_are_scored_side_by_side_and_in_several_passes(family):
    """Whatever was cached before, and whatever the output is."""
    engine = engines.engine(family, logprobs=5, pages=40)
    for new in (0, 12, 0):
        requests = [
            Request(p, max_new_tokens=new, prompt_logprobs=i % 4, logprobs=2, temperature=1.0)
            for i, p in enumerate(PROMPTS)
        ]
        for i, result in enumerate(engines.run(engine, [*requests, Request(PROMPTS[5], max_new_tokens=5)])[:-1]):
            check_scores(engine.pair, PROMPTS[i], result.prompt_logprobs, i % 4)
            assert len(result.tokens) == new and result.finish_reason == "length"
    engines.check_idle(engine)


def test_requests_that_lose_their_pages_are_scored_once():
    engine = engines.engine("gpt_oss", logprobs=5)
    prompts = pairs.prompts([20, 21, 22], seed=42)
    results = engines.run(engine, [Request(p, max_new_tokens=60, prompt_logprobs=1) for p in prompts])
    assert engine.stats.preempted
    for prompt, result in zip(prompts, results, strict=True):
        check_scores(engine.pair, prompt, result.prompt_logprobs, 1)


def test_nobody_else_is_scored():
    engine = engines.engine("gpt_oss", logprobs=5)
    asked, other = engines.run(engine, [Request(PROMPTS[5], prompt_logprobs=0), Request(PROMPTS[6], max_new_tokens=3)])
    assert other.prompt_logprobs is None and len(asked.prompt_logprobs) == 44


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


TEXT = "def fibonacci(n):"


@pytest.mark.parametrize("new", [0, 1, 7])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(served, client, new, stream):
    """As lm-eval asks: texts and ids, several at once; the prompt's first, then the completion's."""
    ids = served.tokenizer.encode(TEXT)
    asked = {
        "model": MODEL,
        "prompt": [TEXT, "import os"],
        "max_tokens": new,
        "temperature": 0,
        "logprobs": 3,
        "echo": True,
    }
    if stream:
        parts = [c for chunk in client.completions.create(**asked, stream=True) for c in chunk.choices if c.index == 0]
        found = [part.logprobs for part in parts if part.logprobs]
        text = "".join(part.text for part in parts)
        values, tops, tokens, offsets = (
            [x for part in found for x in getattr(part, name)]
            for name in ("token_logprobs", "top_logprobs", "tokens", "text_offset")
        )
    else:
        choice = client.completions.create(**asked).choices[0]
        found, text = choice.logprobs, choice.text
        values, tops, tokens, offsets = found.token_logprobs, found.top_logprobs, found.tokens, found.text_offset
    assert len(values) == len(tops) == len(tokens) == len(offsets) == len(ids) + new
    assert values[0] is None and tops[0] is None and offsets[0] == 0
    want = expected(served.engine.pair, ids)
    np.testing.assert_allclose(values[1 : len(ids)], want[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    for value, top, row in zip(values[1 : len(ids)], tops[1 : len(ids)], want, strict=True):
        np.testing.assert_allclose(max(top.values()), row.max(), atol=1e-4)
        assert value in top.values()  # by which lm-eval tells whether a token is the likeliest
    for token, offset in zip(tokens, offsets, strict=True):
        assert text[offset:].startswith(token)
    assert text.startswith(TEXT)


def test_ids_are_scored_as_texts_are(served, client):
    ids = served.tokenizer.encode(TEXT)
    asked = {"model": MODEL, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    text, numbers = (client.completions.create(prompt=prompt, **asked).choices[0] for prompt in (TEXT, ids))
    assert numbers.logprobs == text.logprobs and numbers.text == text.text


def test_what_is_left_of_a_prompt_is_echoed_and_scored(served, client):
    """The text, its tokens and their places are those of the prompt as it was run."""
    ids = served.tokenizer.encode(TEXT)[-3:]
    got = client.completions.create(
        model=MODEL, prompt=[TEXT, "import os"], max_tokens=0, logprobs=1, echo=True, n=2,
        extra_body={"truncate_prompt_tokens": 3},
    ).choices  # fmt: skip
    assert [choice.text for choice in got[:2]] == [served.tokenizer.decode(ids)] * 2 != [TEXT] * 2
    assert [choice.text for choice in got[2:]] == [
        served.tokenizer.decode(served.tokenizer.encode("import os")[-3:])
    ] * 2
    found, want = got[1].logprobs, expected(served.engine.pair, ids)
    np.testing.assert_allclose(found.token_logprobs[1:], want[[0, 1], ids[1:]], atol=1e-4)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert got[1].text[offset:].startswith(token)


def test_prompt_logprobs_as_vllm_has_them(served, client):
    ids = served.tokenizer.encode(TEXT)
    choice = client.completions.create(
        model=MODEL, prompt=TEXT, max_tokens=2, extra_body={"prompt_logprobs": 2}
    ).choices[0]
    want = expected(served.engine.pair, ids)
    assert choice.prompt_logprobs[0] is None and len(choice.prompt_logprobs) == len(ids)
    for token, row, entries in zip(ids[1:], want, choice.prompt_logprobs[1:], strict=True):
        np.testing.assert_allclose(entries[str(token)]["logprob"], row[token], atol=1e-4)
        best = str(int(row.argmax()))
        assert entries[best]["rank"] == 1 and 2 <= len(entries) <= 3
    assert choice.logprobs is None
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "import os"}], max_tokens=2,
        extra_body={"prompt_logprobs": 0, "return_token_ids": True},
    )  # fmt: skip
    row = expected(served.engine.pair, chat.prompt_token_ids)
    for i, (token, entries) in enumerate(zip(chat.prompt_token_ids[1:], chat.prompt_logprobs[1:], strict=True)):
        np.testing.assert_allclose(entries[str(token)]["logprob"], row[i, token], atol=1e-4)


def test_nothing_is_made_where_nothing_is_asked_for(client):
    got = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=0, echo=True)
    assert (got.choices[0].text, got.choices[0].finish_reason, got.usage.completion_tokens) == (TEXT, "length", 0)
    got = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=0)
    assert got.choices[0].text == "" and got.choices[0].logprobs is None


def test_a_token_that_looks_like_a_likelier_one_is_not_taken_for_the_likeliest(served):
    """Half characters all show as one text. A client compares a token's value with the greatest beside it."""
    halves = [i for i in range(256) if probabilities.token_text(served.tokenizer, i) == REPLACEMENT][:2]
    found = [TokenLogprobs(-3.0, ((halves[0], -0.5), (halves[1], -3.0)))]
    told = probabilities.CompletionLogprobs(served.tokenizer).prompt([halves[0], halves[1]], found, 2, "")
    assert told["token_logprobs"][1] == -3.0 and max(told["top_logprobs"][1].values()) == -0.5


@pytest.mark.parametrize("stream", [False, True])
def test_scores_are_written_down_off_the_event_loop(client, monkeypatch, stream):
    """Long prompts have thousands of them; streams of others go on meanwhile."""
    threads, text_of = set(), probabilities.token_text

    def watched(tokenizer, token):
        threads.add(threading.get_ident())
        return text_of(tokenizer, token)

    monkeypatch.setattr(probabilities, "token_text", watched)
    client.completions.create(model=MODEL, prompt=TEXT, max_tokens=1, logprobs=1)
    (loop,) = threads
    threads.clear()
    got = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=1, logprobs=1, echo=True, stream=stream)
    assert not stream or list(got)
    assert threads and loop not in threads
