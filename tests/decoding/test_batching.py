"""A request gets the tokens that it gets alone, whatever else is in the batch; and sampling needs no luck to repeat."""

from functools import cache

import numpy as np
import pytest

from dflash_jax.decoding.generate import generate
from tests.decoding import pairs

pytestmark = pytest.mark.usefixtures("small_chunks")
NEW = 30
LENGTHS = [1, 3, 4, 9, 17, 8, 2, 5, 16, 12, 7, 20]
PROMPTS = pairs.prompts(LENGTHS)
DEFAULTS = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "seed": 0,
}
KINDS = [
    {},
    {"temperature": 1.5},
    {"temperature": 1.0, "top_k": 4, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    {"frequency_penalty": 0.6},
    {"temperature": 2.0, "top_p": 0.8, "frequency_penalty": -0.3, "logit_bias": {1: 1.5, 3: -2.0}},
]
REQUESTS = [DEFAULTS | KINDS[i % len(KINDS)] | {"seed": 100 + i} for i in range(len(PROMPTS))]


def run(order, drafter="dflash", **options):
    """Tokens of the requests in `order`, as one batch."""
    settings = {name: [REQUESTS[i][name] for i in order] for name in DEFAULTS}
    pair = pairs.pair("qwen3_5_moe", drafter, sharpness=3.0)
    outputs = generate(pair, [PROMPTS[i] for i in order], max_new_tokens=NEW, **(settings | options))
    return [output.tokens for output in outputs]


@cache
def together(drafter):
    return run(range(len(PROMPTS)), drafter)


def test_the_requests_differ():
    assert len({tuple(tokens) for tokens in together("dflash")}) == len(PROMPTS)


@pytest.mark.parametrize("drafter", ["dflash", "dflash2"])
def test_the_place_in_the_batch_and_the_neighbours_do_not_matter(drafter):
    backwards = list(reversed(range(len(PROMPTS))))
    assert run(backwards, drafter) == [together(drafter)[i] for i in backwards]
    crowd = [5, 0, 5, 3, 3, 3, 11, 11, 2, 1, 0, 5]
    assert run(crowd, drafter) == [together(drafter)[i] for i in crowd]


@pytest.mark.parametrize("request_id", [0, 2, 3, 5])
def test_alone_is_the_same(request_id):
    """Other shapes, and other steps compiled: only those that the request needs."""
    assert run([request_id]) == [together("dflash")[request_id]]


def test_argmax_drafts_give_the_tokens_of_plain_sampling():
    assert run(range(len(PROMPTS)), draft=False) == together("dflash")


def test_the_seed_decides_and_nothing_else():
    order = range(len(PROMPTS))
    for drafter in ("dflash", "dflash2"):
        assert run(order, drafter) == together(drafter)
        others = run(order, drafter, seed=[7 + i for i in order])
        same = np.array([a == b for a, b in zip(others, together(drafter), strict=True)])
        greedy = np.array([r["temperature"] == 0 for r in REQUESTS])
        np.testing.assert_array_equal(same, greedy)
