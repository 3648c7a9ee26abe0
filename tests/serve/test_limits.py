"""Memory, positions and other kinds of targets: what an engine is not made for, and what goes on in another way."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from dflash_jax.decoding.generate import generate
from dflash_jax.errors import InputError
from serve import config
from serve.config import GREEDY, EngineConfig, resolve
from serve.engine import Busy, Engine
from serve.programs import memory_of
from serve.requests import Request
from tests.decoding import pairs
from tests.serve import engines

ONE = replace(engines.SMALL, slots=1, buckets=(1,), pages=None, prefill=((1, 8),))


@pytest.fixture(scope="module")
def pair():
    return pairs.pair("qwen3", drafter_positions=40)


def test_the_start_tells_how_far_it_is_and_can_be_ended(pair, caplog):
    """Rounds are compiled in threads, and not again where they are called first."""
    told, done = [], ValueError("enough")

    def progress(*numbers):
        told.append(numbers)
        if len(told) == 3:
            raise done

    with pytest.raises(ValueError, match="enough"):
        Engine(pair, ONE, progress)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        Engine(pair, ONE, lambda *numbers: told.append(numbers))
    assert told == [(i, 6) for i in (*range(3), *range(7))]
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Finished XLA compilation of")]
    assert any("run_prefill" in line for line in compiled)
    assert not any("run_rounds" in line for line in compiled)


def test_a_request_past_the_drafters_positions_goes_on_plainly(pair):
    engine = Engine(pair, ONE)
    prompt = pairs.prompts([12])[0]
    (result,) = engines.run(engine, [Request(prompt, max_new_tokens=70)])
    (expected,) = generate(pair, [prompt], max_new_tokens=70, draft=False)
    assert result.tokens == expected.tokens
    assert engine.stats.widths[4] and engine.stats.widths[1] > engine.stats.widths[4]
    # Not recurrent: what it said as long as the drafter's cache was kept up is found again, and is right.
    follow = Request([*prompt, *result.tokens[:20]], max_new_tokens=10)
    handle = engine.submit(follow)
    engines.drain(engine)
    assert handle.usage.cached_tokens == 24
    assert handle.result().tokens == expected.tokens[20:30]
    engines.check_idle(engine)


def test_pages_follow_the_memory():
    pair = engines.pair()
    sizes = resolve(pair, ONE).sizes
    memory = memory_of(pair, sizes)
    assert sizes.pages == 12 + 1
    budget = memory.total - memory.page
    with pytest.raises(InputError, match="there are 12 pages of 8; give at least 13"):
        resolve(pair, replace(ONE, memory_bytes=budget))
    with pytest.raises(InputError, match="memory budget is 0 MiB"):
        resolve(pair, replace(ONE, memory_bytes=1000))
    three = replace(ONE, slots=3, buckets=(3,))
    roomy = memory_of(pair, resolve(pair, three).sizes)
    assert roomy.pages == 37
    within = resolve(pair, replace(three, memory_bytes=roomy.total - 5 * roomy.page - 1)).sizes
    assert within.pages == 31
    assert memory_of(pair, within).total < roomy.total - 5 * roomy.page


def test_an_accelerator_s_memory_is_a_budget(monkeypatch):
    pair, three = engines.pair(), replace(ONE, slots=3, buckets=(3,))
    assert config.device_memory() is None  # no CPU says what it has
    roomy = memory_of(pair, resolve(pair, three).sizes)
    limit = (roomy.total - 5 * roomy.page) / config.MEMORY
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})])
    assert resolve(pair, three).sizes.pages == 32
    assert resolve(pair, replace(three, pages=37)).sizes.pages == 37  # what is asked for is not counted again
    assert resolve(pair, replace(three, memory_bytes=2 * roomy.total)).sizes.pages == 37


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"max_length": 1000}, "max_length is 1000"),
        ({"widths": (9,)}, "1 to 4"),
        ({"buckets": (2,)}, "buckets"),
        ({"prefill": ((1, 12),)}, "multiples"),
        ({"plans": (GREEDY,)}, "temperature"),
        ({"pages": 12}, "at least 13"),
        ({"dispatch_ms": 0}, "dispatch_ms is 0"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        resolve(engines.pair(), replace(ONE, **change))


def test_too_many_requests_are_sent_away(pair):
    engine = Engine(pair, replace(ONE, max_requests=2))
    handles = [engine.submit(Request([1, 2], max_new_tokens=3)) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests"):
        engine.submit(Request([1]))
    engines.drain(engine)
    assert [len(h.result().tokens) for h in handles] == [3, 3]
    engine.submit(Request([1], max_new_tokens=1)).cancel()
    engines.drain(engine)
    engines.check_idle(engine)


def test_defaults_fit_any_pair():
    config = resolve(pairs.pair("qwen3", None), EngineConfig())
    assert (config.widths, config.buckets, config.compiled) == ((1,), (1, 4, 8, 16), (1,))
