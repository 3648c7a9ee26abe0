"""The engine chooses how wide rounds are for each request, and the drafter misses nothing of plain ones."""

from collections import Counter

import pytest

from dflash_jax.decoding.observe import BACKLOG
from dflash_jax.decoding.width import Text, WidthController
from serve.grammar import Grammar
from serve.requests import Request
from tests.decoding import pairs
from tests.serve import engines, test_control

NEW = 70
MANY = 3 + BACKLOG // engines.SMALL.rounds  # dispatches whose plain rounds are more than may be left unread


class Scripted(WidthController):
    """Counts the rounds of each request by width."""

    def __init__(self, widths):
        super().__init__(widths)
        self.rounds = Counter()

    def observe_counts(self, load, width, texts, counts):
        for text, row in zip(texts, counts, strict=True):
            self.rounds[text, width] += len(row)
        super().observe_counts(load, width, texts, counts)


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr("serve.engine.WidthController", Scripted)
    return lambda family, **changes: engines.engine(family, pages=40, adaptive=True, **changes)


def plain_then_wide(engine, requests, dispatches):
    """Run requests with plain rounds for some steps and the widest from then on: results, and plain rounds of each."""
    engine.controller.fixed = 1
    handles = [engine.submit(request) for request in requests]
    for _ in range(dispatches):
        assert engine.step()
    texts = [engine._requests[handle].text for handle in handles]
    engine.controller.fixed = engine.config.widths[-1]
    engines.drain(engine)
    return [(handle.result(), engine.controller.rounds[text, 1]) for handle, text in zip(handles, texts, strict=True)]


def drafted(family, prompt, new):
    """Return the acceptance lengths of the widest rounds after a prompt."""
    return engines.run(engines.engine(family), [Request(prompt, max_new_tokens=new)])[0].acceptance_lengths


@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_drafts_after_plain_rounds_are_those_after_a_prefill(make, family, count):
    """As a batch of all slots and of some; beyond what plain rounds may leave unread, too."""
    engine = make(family, prefix_cache=False)
    requests = [Request(p, max_new_tokens=NEW) for p in pairs.prompts([9, 14, 5][:count], seed=21)]
    for dispatches, least in ((6, 1), (count + MANY, BACKLOG)):
        for request, (result, plain) in zip(requests, plain_then_wide(engine, requests, dispatches), strict=True):
            assert least < plain < NEW - 10 and result.acceptance_lengths[:plain] == [1] * plain
            begun = [*request.prompt, *result.tokens[:plain]]
            assert result.acceptance_lengths[plain:] == drafted(family, begun, NEW - plain)
    engines.check_idle(engine)


def test_what_was_left_unread_is_nobody_elses(make):
    """A slot's next request begins with nothing unread, however the one before it ended."""
    engine = make("qwen3_5_moe")
    first, prompt = pairs.prompts([11, 14], seed=22)
    for ends in ("cancelled", "length"):
        engine.controller.fixed = 1
        handle = engine.submit(Request(first, max_new_tokens=12))
        for _ in range(4):
            engine.step()
        if ends == "cancelled":
            handle.cancel()
        engines.drain(engine)
        assert handle.result().finish_reason == ends
        engine.controller.fixed = 4
        (result,) = engines.run(engine, [Request(prompt, max_new_tokens=NEW)])
        assert result.acceptance_lengths == drafted("qwen3_5_moe", prompt, NEW)


def test_the_prefix_cache_holds_what_the_drafter_has_read(make):
    """A prompt that goes on after a plain answer finds only pages that both models have filled."""
    engine = make("gpt_oss")
    for plain, cached, prompt in zip((10, 45), (8, 32), pairs.prompts([13, 14], seed=23), strict=True):
        engine.controller.fixed = 1
        (result,) = engines.run(engine, [Request(prompt, max_new_tokens=plain)])
        again = [*prompt, *result.tokens, 1, 2]
        engine.controller.fixed = 4
        handle = engine.submit(Request(again, max_new_tokens=30))
        engines.drain(engine)
        assert handle.usage.cached_tokens >= cached
        assert handle.result().acceptance_lengths == drafted("gpt_oss", again, 30)
    engines.check_idle(engine)


def test_a_request_that_lost_its_pages_drafts_as_before(make):
    """Preempted amid plain rounds and prefilled again, it leaves nothing of its old slot's behind."""
    engine = engines.engine("qwen3_5_moe", adaptive=True)
    requests = [Request(p, max_new_tokens=NEW) for p in pairs.prompts([20, 21, 22], seed=24)]
    handles = [engine.submit(request) for request in requests]
    engine.controller.fixed = 1
    while not engine.stats.preempted:
        assert engine.step()
    engine.controller.fixed = 4
    engines.drain(engine)
    for request, handle in zip(requests, handles, strict=True):
        result = handle.result()
        assert result.tokens == engines.alone(request).tokens
        plain = next(i for i, n in enumerate(result.acceptance_lengths) if n > 1)
        lengths = drafted("qwen3_5_moe", [*request.prompt, *result.tokens[:plain]], NEW - plain)
        assert result.acceptance_lengths[plain:] == lengths


class Known(Text):
    """A text of which it is known what its drafts are worth."""

    worth = 1.0

    def expected(self, width):
        return 1.0 if width == 1 else self.worth

    def due(self, rounds):
        return False


def test_each_request_has_its_own_width(monkeypatch, make):
    """One whose drafts are worth something takes wide rounds right after one whose drafts are worth nothing."""
    engine = make("qwen3_5_moe")
    engine.controller.text = lambda grammar=False: Known(engine.controller.free)
    engine.controller.observe_cost = lambda *_: None
    for load in [(plan, bucket) for plan in engine.config.plans for bucket in engine.config.buckets]:
        engine.controller.assume_costs(load, {1: 1e-3, 4: 2e-3})
    for worth, width in ((1.0, 1), (3.0, 4)) * 3:
        Known.worth = worth
        before = engine.controller.rounds.copy()
        request = Request([1, 2, 3], max_new_tokens=NEW)
        assert engines.run(engine, [request])[0].tokens == engines.alone(request).tokens
        rounds = Counter()
        for (_, taken), count in (engine.controller.rounds - before).items():
            rounds[taken] += count
        assert set(rounds) == {width}


def test_rounds_with_a_grammar_have_the_width_that_pays(monkeypatch, make):
    """As other requests', by an acceptance of their own."""
    monkeypatch.setattr("tests.serve.engines.pair", lambda family: test_control.pair())
    engine = make("qwen3", grammar=True)
    engine.controller.text = lambda grammar=False: Known(engine.controller.bound if grammar else engine.controller.free)
    engine.controller.observe_cost = lambda *_: None
    for bucket in engine.config.buckets:
        engine.controller.assume_costs(engine.config.masked(bucket, 1).load, {1: 1e-3, 4: 2e-3})
    request = Request([1, 2, 3], max_new_tokens=25, grammar=Grammar("regex", "(a|bc|d[ce]){20,}"))
    found = []
    for worth, width in ((1.0, 1), (3.0, 4), (1.0, 1)):
        Known.worth = worth
        before = engine.controller.rounds.copy()
        found.append(engines.run(engine, [request])[0].tokens)
        assert {taken for _, taken in engine.controller.rounds - before} == {width}
    assert found[0] == found[1] == found[2]
