"""Random arrivals, cancels and preemptions: right tokens, and no page is ever lost."""

from functools import cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dflash_jax.decoding.generate import generate
from serve.requests import Request
from tests.decoding import pairs
from tests.serve import engines

NEW = 44
_start = pairs.prompts([24, 32], seed=20)
PROMPTS = [a + b for a in ([], *_start) for b in pairs.prompts([1, 7, 19], seed=21)]


@cache
def plain(kind: int) -> list[list[int]]:
    """What plain decoding makes of every prompt."""
    return [g.tokens for g in generate(engines.pair(), PROMPTS, max_new_tokens=NEW, draft=False, **engines.KINDS[kind])]


@cache
def shared_engine():
    return engines.engine()


class Serving(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.engine, self.sent, self.cancelled = shared_engine(), [], set()

    @rule(prompt=st.integers(0, len(PROMPTS) - 1), kind=st.integers(0, 4), new=st.integers(1, NEW) | st.just(NEW))
    def submit(self, prompt, kind, new):
        request = Request(PROMPTS[prompt], max_new_tokens=new, **engines.KINDS[kind])
        self.sent.append((self.engine.submit(request), plain(kind)[prompt][:new]))

    @rule(count=st.integers(1, 6))
    def some_steps(self, count):
        for _ in range(count):
            self.engine.step()

    @rule(which=st.integers(0, 100))
    def cancel(self, which):
        if self.sent:
            handle, _ = self.sent[which % len(self.sent)]
            handle.cancel()
            self.cancelled.add(handle)

    @invariant()
    def pages_are_accounted_for(self):
        if hasattr(self, "engine"):
            engines.check(self.engine)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        engines.drain(self.engine)
        engines.check_idle(self.engine)
        for handle, expected in self.sent:
            result = handle.result()
            if result.finish_reason == "cancelled":
                assert handle in self.cancelled
                assert result.tokens == expected[: len(result.tokens)]
            else:
                assert result.tokens == expected


class TestServing(Serving.TestCase):
    settings = settings(
        max_examples=25, stateful_step_count=25, deadline=None, derandomize=True, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def runTest(self):
        super().runTest()
        stats = shared_engine().stats
        assert stats.preempted and stats.cached_tokens, "the random runs do not meet what they are for"
