"""Rounds whose width changes give the same tokens, and the width follows what was measured."""

from dataclasses import replace
from itertools import cycle

import jax
import pytest

from dflash_jax.decoding.generate import generate, stream
from dflash_jax.decoding.width import FEW_ROUNDS, MOST_ROUNDS, TRIALS_SHARE, Pace, usual_widths
from dflash_jax.errors import InputError
from tests.decoding import pairs

PROMPTS = pairs.prompts([2, 9, 21])
NEW = 60
SAMPLED = {"temperature": 1.1, "top_p": 0.9, "seed": [1, 2, 3], "repetition_penalty": 1.2}


class Scripted(Pace):
    """Takes these widths in turns, three rounds each."""

    def __init__(self, widths):
        super().__init__(widths)
        self.turns, self.seen = cycle(widths), []

    def next(self, load, texts):
        return next(self.turns), 3

    def saw(self, load, width, texts, counts, seconds):
        self.seen.append((width, counts))


class Clock(Pace):
    """A pace to which a round of so many rows takes so long."""

    def __init__(self, costs):
        super().__init__(list(costs))
        self.costs, self.taken = costs, []

    def saw(self, load, width, texts, counts, seconds):
        rounds = max(map(len, counts))
        self.taken.append((width, rounds))
        super().saw(load, width, texts, counts, rounds * self.costs[width])


def with_pace(family, pace):
    pair = replace(pairs.pair(family))
    vars(pair)["pace"] = pace
    return pair


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3_5_moe", {}), ("qwen3_5_moe", SAMPLED), ("gpt_oss", {})],
    ids=["hybrid, greedy", "hybrid, sampled", "gpt_oss, greedy"],
)
def test_tokens_do_not_depend_on_the_widths(family, settings):
    block = pairs.pair(family).drafter.config.block_size
    pace = Scripted([1, block, 2])
    found = generate(with_pace(family, pace), PROMPTS, max_new_tokens=NEW, width="adaptive", **settings)
    expected = generate(pairs.pair(family), PROMPTS, max_new_tokens=NEW, draft=False, **settings)
    assert [g.tokens for g in found] == [g.tokens for g in expected]
    assert {width for width, _ in pace.seen} == {1, 2, block}
    assert all(1 <= count <= width for width, counts in pace.seen for row in counts for count in row)
    assert max(count for width, counts in pace.seen for row in counts for count in row) > 1  # drafts are accepted
    assert max(len(row) for _, counts in pace.seen for row in counts) == 3


def test_a_stream_takes_the_widths_too():
    pace = Scripted([1, 4])
    pieces = list(stream(with_pace("qwen3_5_moe", pace), PROMPTS[1], max_new_tokens=NEW, width="adaptive"))
    expected = generate(pairs.pair("qwen3_5_moe"), PROMPTS[1], max_new_tokens=NEW)[0]
    assert [token for piece in pieces for token in piece.tokens] == expected.tokens
    assert {width for width, _ in pace.seen} == {1, 4}


@pytest.mark.parametrize(("costs", "best"), [({1: 1.0, 2: 9.0, 4: 20.0}, 1), ({1: 1.0, 2: 1.3, 4: 1.02}, 4)])
def test_the_width_that_pays_is_taken(costs, best):
    pace = Clock(costs)
    pair = with_pace("qwen3_5_moe", pace)
    for _ in range(6):
        generate(pair, PROMPTS, max_new_tokens=NEW, width="adaptive")
    first = [next(rounds for width, rounds in pace.taken if width == w) for w in costs]
    assert first == [1, 1, 1]  # it may have compiled
    assert {rounds for _, rounds in pace.taken} <= set(range(1, MOST_ROUNDS + 1))
    later = pace.taken[len(pace.taken) // 2 :]
    assert sum(rounds for width, rounds in later if width == best) > 0.8 * sum(rounds for _, rounds in later)


def test_the_first_dispatch_of_a_width_is_not_timed():
    pace, taken = Pace([1, 4]), []
    texts = pace.texts(1)
    for _ in range(12):
        width, rounds = pace.next("load", texts)
        compiling = 100 if width == 4 and (4, 1) not in taken else 0
        pace.saw("load", width, texts, [[width] * rounds], rounds * width**0.5 + compiling)
        taken.append((width, rounds))
    assert taken.count((1, 1)) == taken.count((4, 1)) == 1
    assert taken.count((4, FEW_ROUNDS)) > 0 and taken.count((4, MOST_ROUNDS)) > 6
    assert pace.next("another load", texts)[1] == 1


def test_drafts_that_are_worth_nothing_take_a_small_share_of_the_time():
    pace = Clock({1: 1.0, 2: 9.0, 4: 20.0})
    pair = with_pace("qwen3_5_moe", pace)
    expected = generate(pair, PROMPTS, max_new_tokens=NEW, draft=False)
    for _ in range(40):
        found = generate(pair, PROMPTS, max_new_tokens=NEW, width="adaptive")
        assert [g.tokens for g in found] == [g.tokens for g in expected]
    later = pace.taken[len(pace.taken) // 2 :]  # the first trials need not have been saved for
    spent = sum(rounds * pace.costs[width] for width, rounds in later if width > 1)
    assert 0 < spent < 1.5 * TRIALS_SHARE * sum(rounds * pace.costs[width] for width, rounds in later)


def test_usual_widths():
    assert [usual_widths(block) for block in (1, 2, 3, 16)] == [(1,), (1, 2), (1, 2, 3), (1, 8, 16)]


def test_what_cannot_adapt_is_refused(monkeypatch):
    pair = pairs.pair("qwen3_5_moe")
    with pytest.raises(InputError, match="width is adaptive, and there is no drafter at work"):
        generate(pair, PROMPTS, width="adaptive", draft=False)
    with pytest.raises(InputError, match=r"width is 'adaptiv'; give a whole number from 1 to .*, or 'adaptive'"):
        generate(pair, PROMPTS, width="adaptiv")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="several processes"):
        generate(pair, PROMPTS, width="adaptive")
