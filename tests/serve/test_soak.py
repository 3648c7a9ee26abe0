"""The soak in short: hundreds of requests and cancels, and nothing is left behind."""

import pytest

from benchmarks.soak import KINDS, Soak, cases
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
