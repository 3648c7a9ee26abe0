"""Requests get what `generate` gives them alone; nothing is compiled later; the host waits once a dispatch."""

import logging
import re
import threading
import time

import jax
import pytest

from dflash_jax.errors import InputError
from serve.engine import Engine
from serve.passes import PassCosts
from serve.requests import Request
from tests.decoding import pairs
from tests.serve import engines

LENGTHS = [3, 20, 9, 41, 1, 17, 8, 30, 12]
PROMPTS = pairs.prompts(LENGTHS, seed=1)
REQUESTS = [Request(p, max_new_tokens=30, **engines.KINDS[i % 5]) for i, p in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def engine():
    return engines.engine()


def test_every_request_gets_what_it_gets_alone(engine):
    """Greedy and sampled, with penalties and biases, joining and leaving at different times; drafts are accepted."""
    results = engines.run(engine, REQUESTS)
    assert [r.tokens for r in results] == [e.tokens for e in engines.expected(REQUESTS)]
    for i in (0, 5):  # greedy
        assert results[i] == engines.alone(REQUESTS[i])
    assert engine.stats.accepted > 20
    engines.check_idle(engine)


def test_stop_ids_and_stop_strings(engine):
    """Each request its own; a text is found across rounds and across dispatches."""
    full = engines.alone(REQUESTS[0])
    at = 10
    stops = [(full.tokens[at],), full.text[2 * at : 2 * at + 5], ("zz", full.text[:3])]
    requests = [Request(PROMPTS[0], max_new_tokens=30, stop=stop) for stop in stops]
    for request, result in zip(requests, engines.run(engine, requests), strict=True):
        expected = engines.alone(request)
        assert (result.tokens, result.text) == (expected.tokens, expected.text)
        assert result.finish_reason == "stop"
        assert len(result.tokens) < 30
    engines.check_idle(engine)


def test_nothing_is_compiled_after_the_start(engine, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        engines.run(engine, [Request([1, 2, 3], max_new_tokens=9, **kind) for kind in engines.KINDS])
        engines.run(engine, [Request([4] * n, max_new_tokens=60, stop=[5]) for n in (1, 33, 8)])
    assert not [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]


def test_the_host_waits_once_a_dispatch(engine, monkeypatch):
    """And a dispatch gives at least as many tokens as it has rounds and rows."""
    reads, read = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: reads.append(1) or read(x))
    before = engine.stats.tokens, engine.stats.host_syncs
    prompts = pairs.prompts([4, 5, 6], seed=3)
    with jax.transfer_guard_device_to_host("disallow_explicit"), monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", lambda x: reads.append(1) or _allowed(read, x))
        engines.run(engine, [Request(p, max_new_tokens=48, stop=[]) for p in prompts])
    tokens, syncs = engine.stats.tokens - before[0], engine.stats.host_syncs - before[1]
    assert tokens == 3 * 48
    assert len(reads) == syncs
    per_dispatch = len(prompts) * engines.SMALL.rounds
    assert syncs <= tokens / per_dispatch + len(prompts) + 2  # prompts come one or two at a time


def _allowed(read, x):
    with jax.transfer_guard_device_to_host("allow"):
        return read(x)


def test_a_dispatch_is_made_before_the_news_of_the_one_before_are_read(engine, monkeypatch):
    events = []
    prefill, rounds, collect = engine.programs.prefill, engine.programs.rounds, engine._collect
    monkeypatch.setattr(engine.programs, "prefill", lambda *a: events.append("d") or prefill(*a))
    monkeypatch.setattr(engine.programs, "rounds", lambda *a: events.append("d") or rounds(*a))
    monkeypatch.setattr(engine, "_collect", lambda: events.append("c") or collect())
    engines.run(engine, [Request([1, 2, 3], max_new_tokens=60)])
    text = "".join(events)
    assert "dcdcdcdc" in text
    ahead = [text[:i].count("d") - text[:i].count("c") for i in range(2, len(text) - 3)]
    assert sum(n == 2 for n in ahead) >= len(ahead) // 3, text


def test_prompts_come_before_rounds_but_not_for_long(engine, monkeypatch):
    """All slots are filled before they decode; a prompt of many passes lets the others have rounds in between."""
    events, prefill, rounds = [], engine.programs.prefill, engine.programs.rounds
    monkeypatch.setattr(engine.programs, "prefill", lambda *a: events.append("p") or prefill(*a))
    monkeypatch.setattr(engine.programs, "rounds", lambda rows, *a: events.append(str(len(rows))) or rounds(rows, *a))
    monkeypatch.setattr("serve.passes.PassCosts.seconds", lambda *_: 0.007)
    monkeypatch.setattr("serve.passes.PassCosts.observe", lambda *_: None)
    engines.run(engine, [Request(p, max_new_tokens=30) for p in pairs.prompts([12, 13, 14], seed=31)])
    assert re.fullmatch("ppp+3[0-9]*", "".join(events)), events
    events.clear()
    engines.run(engine, [Request(p, max_new_tokens=60) for p in pairs.prompts([9, 90], seed=32)])
    text = "".join(events)
    assert re.match("p{4}1p{4}[12]", text), text  # 25 ms
    monkeypatch.setattr("serve.passes.PassCosts.seconds", lambda *_: 0.05)
    events.clear()
    engines.run(engine, [Request(p, max_new_tokens=60) for p in pairs.prompts([9, 90], seed=33)])
    text = "".join(events)
    assert re.match("pp(1p){6}2", text), text


def test_passes_become_narrow_where_wide_ones_take_long(engine, monkeypatch):
    """And what a pass costs is learnt from passes far behind the start of a prompt."""
    shapes, prefill = [], engine.programs.prefill
    monkeypatch.setattr(engine.programs, "prefill", lambda *a: shapes.append(a[0]) or prefill(*a))
    monkeypatch.setattr("serve.passes.FAR", 16)
    costs = PassCosts(engine.controller)
    for shape in engine.config.prefill:
        costs.assume(shape, 0.001)
    for _ in range(50):
        costs.observe((1, 16), 64, 1.0)
    assert costs.seconds((1, 16), 64) == pytest.approx(1.0, rel=0.01)
    assert costs.seconds((2, 8), 32) == pytest.approx(0.5, rel=0.01)
    monkeypatch.setattr(engine.controller, "observe_cost", lambda *_: None)
    (prompt,) = pairs.prompts([80], seed=34)
    (result,) = engines.run(engine, [Request(prompt, max_new_tokens=9)])
    assert shapes == [(1, 16)] + [(2, 8)] * 8  # more than 250 ms from 16 tokens on
    assert result.tokens == engines.alone(Request(prompt, max_new_tokens=9)).tokens


def test_a_dispatch_ends_with_the_first_request_that_does(engine, monkeypatch):
    """So that another can have its place."""
    done, saw = [], engine.stats.saw_rounds
    monkeypatch.setattr(engine.stats, "saw_rounds", lambda *a: done.append(a[-1]) or saw(*a))
    engines.run(engine, [Request(p, max_new_tokens=n) for p, n in zip(pairs.prompts([4, 5]), (2, 40), strict=True)])
    assert done[0] == 1
    assert engines.SMALL.rounds in done


def test_a_dispatch_made_before_somebody_ended_gives_up_its_place_soon(engine, monkeypatch):
    """Its first round bridges the time until the host knows; without more it would keep the next request waiting."""
    done, saw = [], engine.stats.saw_rounds
    monkeypatch.setattr(engine.stats, "saw_rounds", lambda *a: done.append(a[-1]) or saw(*a))
    prompts = pairs.prompts([4, 5, 6], seed=7)
    ids = engines.alone(Request(prompts[0], max_new_tokens=30)).tokens
    stop = next(id for id in ids if id != ids[0])  # which the host cannot foresee
    requests = [Request(p, max_new_tokens=60, stop=(stop,) if p is prompts[0] else ()) for p in prompts]
    engines.run(engine, requests)
    assert done[0] < engines.SMALL.rounds and done[1:3] == [1, engines.SMALL.rounds], done


def test_dispatches_are_short_while_somebody_could_come(engine, monkeypatch):
    """By what a round costs; but not where all slots are taken."""
    plans, rounds = [], engine.programs.rounds
    monkeypatch.setattr(
        engine.programs,
        "rounds",
        lambda rows, new, plan: plans.append((len(rows), plan.rounds)) or rounds(rows, new, plan),
    )
    for seconds, expected in ((1e-4, 3), (0.012, 2), (0.5, 1)):
        monkeypatch.setattr(engine.controller, "cost", lambda *_, seconds=seconds: seconds)
        plans.clear()
        engines.run(engine, [Request(p, max_new_tokens=40) for p in pairs.prompts([4, 5], seed=8)])
        assert {n for _, n in plans} == {expected}
        plans.clear()
        engines.run(engine, [Request(p, max_new_tokens=40) for p in pairs.prompts([4, 5, 6], seed=8)])
        assert {n for rows, n in plans if rows == 3} == {3}


def test_who_asks_again_at_once_is_in_the_next_dispatch(monkeypatch):
    """The loop waits a little for a newcomer where somebody has just ended, while the device has a round to do."""
    engine = engines.engine()
    assert engine.step() is False
    first = engine.submit(Request([1, 2, 3], max_new_tokens=2))
    engine.submit(Request([4, 5], max_new_tokens=60))
    while first.finished is None:
        engine.step()
    monkeypatch.setattr(engine.controller, "cost", lambda *_: 60.0)
    next_one = Request([1, 1, 2], max_new_tokens=2)
    threading.Timer(0.3, engine.submit, [next_one]).start()
    start = time.perf_counter()
    engine.step()
    assert 0.2 < time.perf_counter() - start < 20
    assert any(r.prompt == [1, 1, 2] for r in engine.scheduler.running)
    monkeypatch.undo()
    engines.drain(engine)


def test_page_tables_get_new_pages_only(engine, monkeypatch):
    sent, rounds = [], engine.programs.rounds
    monkeypatch.setattr(engine.programs, "rounds", lambda rows, new, plan: sent.extend(new) or rounds(rows, new, plan))
    engines.run(engine, [Request([2, 2, 5], max_new_tokens=80)])
    entries = [(slot, entry) for slot, entry, _ in sent]
    assert len(entries) == len(set(entries)) <= 96 // 8


def test_a_hit_in_the_prefix_cache_changes_nothing(engine):
    """Tokens, and how many drafts are accepted in each round: recurrent state and draft keys come with the pages."""
    prompt = pairs.prompts([45], seed=9)[0]
    (cold,) = engines.run(engine, [Request(prompt, max_new_tokens=40)])
    before = engine.stats.cached_tokens
    handle = engine.submit(Request(prompt, max_new_tokens=40))
    engines.drain(engine)
    warm = handle.result()
    assert handle.usage.cached_tokens == 40  # five pages of the 45 tokens
    assert engine.stats.cached_tokens == before + 40
    assert warm == cold
    assert sum(warm.acceptance_lengths) > 1.2 * len(warm.acceptance_lengths)


def test_prompts_that_begin_alike_share_pages(engine):
    """The third one: the second shows that others may go another way there, and leaves its state behind."""
    start = pairs.prompts([24], seed=10)[0]
    tails = pairs.prompts([9, 10, 11], seed=11)
    for tail, expected in zip(tails, (0, 0, 24), strict=True):
        handle = engine.submit(Request([*start, *tail], max_new_tokens=20))
        engines.drain(engine)
        assert handle.usage.cached_tokens == expected
        assert handle.result().tokens == engines.alone(handle.request).tokens
    engines.check_idle(engine)


def test_a_prompt_that_came_several_times_is_prefilled_once(engine):
    """All but what follows its last full page; others do not wait for that."""
    before = engine.stats.prefill_tokens, engine.stats.prefix_hits
    prompt, other = pairs.prompts([45, 11], seed=12)
    requests = [Request(prompt, max_new_tokens=9, temperature=1.0, seed=i) for i in range(5)]
    handles = [engine.submit(r) for r in [*requests, Request(other, max_new_tokens=9)]]
    engine.step()
    assert [r.prompt for r in engine.scheduler.running] == [prompt, other]
    engines.drain(engine)
    assert [h.usage.cached_tokens for h in handles] == [0, 40, 40, 40, 40, 0]
    assert engine.stats.prefill_tokens - before[0] == 45 + 4 * 5 + 11
    assert engine.stats.prefix_hits - before[1] == 4
    assert [h.result().tokens for h in handles[:5]] == [e.tokens for e in engines.expected(requests)]
    engines.check_idle(engine)


def test_cancelling_frees_everything(engine):
    handles = [engine.submit(Request(p, max_new_tokens=50)) for p in PROMPTS[:6]]
    for _ in range(4):
        engine.step()
    for handle in handles[::2]:
        handle.cancel()
    engines.drain(engine)
    assert [h.result().finish_reason == "cancelled" for h in handles] == [True, False] * 3
    for handle in handles[1::2]:
        assert handle.result().tokens == engines.alone(handle.request).tokens
    engines.check_idle(engine)


def test_cancelling_all_leaves_what_comes_later(engine):
    handles = [engine.submit(Request(p, max_new_tokens=50)) for p in PROMPTS[:6]]
    for _ in range(4):
        engine.step()
    handles.append(engine.submit(Request(PROMPTS[6], max_new_tokens=50)))
    engine.cancel_all()
    later = engine.submit(REQUESTS[0])
    engines.drain(engine)
    assert {h.result().finish_reason for h in handles} == {"cancelled"}
    assert later.result() == engines.alone(REQUESTS[0])
    engines.check_idle(engine)


def test_a_sender_whose_delivery_raises_ends_its_own_request_only(engine, caplog):
    events, cancelled = [], engine.stats.cancelled

    def deliver(event):
        events.append(event)
        raise ValueError("not today")

    good = engine.submit(REQUESTS[0])
    engine.submit(Request(PROMPTS[1], max_new_tokens=50), deliver)
    engine.submit(Request(PROMPTS[4], max_new_tokens=1), deliver)
    engines.drain(engine)
    assert good.result() == engines.alone(REQUESTS[0])
    assert len(events) == 2 and engine.stats.cancelled == cancelled + 1
    assert caplog.text.count("ValueError: not today") == 2
    engines.check_idle(engine)


def test_preempted_requests_are_run_again(engine):
    before = engine.stats.preempted
    requests = [Request(p, max_new_tokens=55) for p in PROMPTS[:3]]
    results = engines.run(engine, requests)
    assert engine.stats.preempted > before
    assert [r.tokens for r in results] == [engines.alone(r).tokens for r in requests]
    engines.check_idle(engine)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1] * 96), "at most 95"),
        (Request([]), "empty"),
        (Request([1], max_new_tokens=-1), "max_new_tokens"),
        (Request([1], prompt_logprobs=1), "started without logprobs; leave prompt_logprobs out"),
        (Request([1], temperature=-1), "temperature"),
        (Request([1], stop=list(range(6)) * 3 + [""]), "stop"),
    ],
)
def test_bad_requests_are_refused_at_once(engine, request_, message):
    with pytest.raises(InputError, match=message):
        engine.submit(request_)
    engines.check_idle(engine)


def test_a_close_while_a_turn_begins_is_seen(monkeypatch):
    engine, begun = engines.engine(), threading.Event()

    def late() -> bool:
        begun.set()
        while engine._commands.empty():
            time.sleep(0.001)
        return Engine.step(engine)

    monkeypatch.setattr(engine, "step", late)
    engine.start()
    assert begun.wait(10)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


def test_the_thread_serves_and_ends(engine):
    with engine:
        handles = [engine.submit(r) for r in REQUESTS[:4]]
        pieces = list(handles[0])
        results = [h.result() for h in handles]
        left = [engine.submit(Request(p, max_new_tokens=50)) for p in PROMPTS[:6]]
    assert "cancelled" in {h.result().finish_reason for h in left}
    engines.check_idle(engine)
    assert [t for p in pieces for t in p.tokens] == results[0].tokens
    assert len(pieces) > 2
    assert [r.tokens for r in results] == [e.tokens for e in engines.expected(REQUESTS[:4])]
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(REQUESTS[0])
