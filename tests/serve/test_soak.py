"""The soak in short: hundreds of requests and cancels, and nothing is left behind."""

import re
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.soak import KINDS, Soak, cases
from tests.serve import engines


@pytest.fixture(scope="module")
def pool():
    return cases(engines.pair(), 16, new_tokens=40, longest=40, kinds=(KINDS[0], KINDS[3]))


@pytest.fixture(scope="module")
def engine():
    with engines.engine() as engine:
        yield engine


def test_hundreds_of_requests_leave_nothing_behind(engine, pool):
    soak = Soak(engine, pool)
    soak.run(lambda sent: sent < 60, ahead=12, longest=40, cancels=0.1)
    soak.warm()
    soak.run(lambda sent: sent < 200, ahead=12, longest=6)
    soak.run(lambda sent: sent < 100, ahead=12, longest=40, cancels=0.15)
    report = soak.done()
    assert not report.problems
    assert report.finished + report.cancelled == 360
    assert report.cancelled > 5
    engines.wait_idle(engine)


def short(engine, pool) -> Soak:
    soak = Soak(engine, pool)
    soak.warm()
    soak.run(lambda sent: sent < 4, ahead=4, longest=3)
    return soak


def test_a_wrong_output_is_a_problem(engine, pool):
    wrong = [replace(case, tokens=[case.tokens[0] ^ 1, *case.tokens[1:]]) for case in pool[:1]]
    problems = short(engine, wrong).done().problems
    assert len(problems) == 4
    assert all(re.fullmatch(r"request \d gave \[.+\], not \[.+\]", problem) for problem in problems)


def test_only_drawn_answers_of_a_selector_may_differ(monkeypatch, pool):
    assert all(case.exact for case in pool)
    monkeypatch.setattr(
        "benchmarks.soak.generate", lambda pair, prompts, **_: [SimpleNamespace(tokens=[0])] * len(prompts)
    )
    config = SimpleNamespace(vocab_size=9)
    for selector, expected in ((None, 5), (object(), 2)):
        drafts = SimpleNamespace(drafter=SimpleNamespace(selector=selector), target=SimpleNamespace(config=config))
        assert sum(case.exact for case in cases(drafts, 5, new_tokens=4, longest=4)) == expected


@pytest.mark.parametrize(
    "count, reason, wrong",
    [(3, "length", 0), (2, "length", 1), (4, "length", 1), (2, "stop", 0), (1, "cancelled", 0), (4, "cancelled", 1)],
)
def test_those_have_the_right_length(engine, pool, count, reason, wrong):
    soak = Soak(engine, pool)
    request = replace(pool[0].request, max_new_tokens=3)
    soak._live[0] = SimpleNamespace(request=request), replace(pool[0], exact=False)
    soak._check(0, SimpleNamespace(tokens=[9] * count, finish_reason=reason))
    assert len(soak.report.problems) == wrong


def test_what_is_left_behind_is_a_problem(engine, pool, tmp_path):
    """A page, a slot, a request, a file."""
    soak = short(engine, pool)
    pages = engine.scheduler.pages.take(1)
    problems = soak.done().problems
    engine.scheduler.pages.release(pages)
    assert held_in(problems) == ["pages: holders are not the sequences", "1 pages are held by nobody"]
    soak = short(engine, pool)
    scheduler = copy(engine.scheduler)  # the engine's thread may still look at its own
    scheduler.slots = [None, SimpleNamespace(order=0, pages=[]), None]
    soak.engine = SimpleNamespace(scheduler=scheduler, stats=SimpleNamespace(unfinished=2, preempted=0))
    assert held_in(soak.done().problems) == ["slots are taken: 1", "2 requests have not ended"]
    soak = short(engine, pool)
    with (tmp_path / "left").open("w"):
        assert any(problem.startswith("threads and handles grew from") for problem in soak.done().problems)
    assert not held_in(short(engine, pool).done().problems)


def held_in(problems: list[str]) -> list[str]:
    """Without what other tests of this process may have left open meanwhile."""
    return [problem for problem in problems if "grew" not in problem]
