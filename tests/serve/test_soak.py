"""The soak in short: hundreds of requests and cancels, and nothing is left behind; and that it would notice."""

import time

import pytest

from benchmarks.soak import KINDS, Case, Resources, Soak, cases, held
from tests.serve import engines


@pytest.fixture(scope="module")
def pool():
    return cases(engines.pair(), 16, new_tokens=40, longest=40, kinds=(KINDS[0], KINDS[3]))


def test_hundreds_of_requests_leave_nothing_behind(pool):
    engine = engines.engine()
    with engine:
        soak = Soak(engine, pool)
        soak.run(lambda sent: sent < 60, ahead=12, longest=40, cancels=0.1)
        soak.warm()
        soak.run(lambda sent: sent < 200, ahead=12, longest=6)
        soak.run(lambda sent: sent < 100, ahead=12, longest=40, cancels=0.15)
        report = soak.done()
    assert not report.problems
    assert report.finished + report.cancelled == 360
    assert report.cancelled > 5
    engines.check_idle(engine)


def test_wrong_outputs_and_leaks_are_noticed(pool):
    engine = engines.engine()
    with engine:
        soak = Soak(engine, [Case(pool[0].request, [*pool[0].tokens[:-1], -1])])
        soak.warm()
        soak.run(lambda sent: sent < 40, ahead=4, longest=40)
        wrong = len(soak.report.problems)
        assert 0 < wrong < 40  # only outputs of full length have the wrong token
        file, ballast = open(__file__), bytearray(b"x" * (Resources.now().memory // 30))  # noqa: SIM115
        (lost,) = engine.scheduler.pages.take(1)
        time.sleep(0.01)
        problems = soak.done().problems[wrong:]
        file.close()
        assert len(ballast) and any("handles" in p for p in problems) and any("memory" in p for p in problems)
        assert "1 pages are held by nobody" in problems
        engine.scheduler.pages.release([lost])
    assert not held(engine)
