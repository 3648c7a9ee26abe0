import dataclasses
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from dflash_jax.decoding.prefill import capacity
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.target import Target
from dflash_jax.pair import Pair
from dflash_jax.text import Tokenizer
from tests import weights
from tests.train import tiny
from tests.train.small import SMALL
from train import regenerate as module
from train.processes import Share
from train.regenerate import RegenerateConfig, is_sampled, plan, regenerate

VOCAB, END, MASK = 24, 0, 1
CONFIG = RegenerateConfig(longest=12, response=7, sampled=0.5, batch=4)


def make_pair(drafter: bool = False) -> Pair:
    target = weights.noisy(lambda: Target(tiny.TARGET.target_config(VOCAB, END), rngs=nnx.Rngs(1)))
    made = None
    if drafter:
        config = SMALL.drafter_config(target.config, MASK)
        made = weights.noisy(lambda: Drafter(config, rngs=nnx.Rngs(2)))
    return Pair(target, made, Tokenizer(None, Path(), VOCAB))


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


def prompts(count: int = 10) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, size).tolist() for size in rng.integers(3, 13, count)]


def read(folder: Path) -> list[dict]:
    """All lines of all files, by prompt."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["id"])


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert regenerate(pair, prompts(), CONFIG, folder)
    return folder


def test_every_prompt_has_one_response_behind_it(whole):
    lines = read(whole)
    assert [line["id"] for line in lines] == list(range(10))
    for line, prompt in zip(lines, prompts(), strict=True):
        assert line["tokens"][: line["prompt"]] == prompt
        length = len(line["tokens"]) - len(prompt)
        ended = line["tokens"][-1] == END
        assert line["finish_reason"] == ("stop" if ended else "length") and (ended or length == CONFIG.response)


def test_greedy_responses_are_the_argmax_of_the_whole_sequence(pair, whole):
    greedy = [line for line in read(whole) if not module.is_sampled(CONFIG, line["id"])]
    assert 0 < len(greedy) < 10
    for line in greedy:
        best = np.asarray(pair.logits([line["tokens"]]))[0].argmax(-1)
        assert line["tokens"][line["prompt"] :] == best[line["prompt"] - 1 : -1].tolist()


def test_the_number_of_processes_changes_nothing(pair, whole, tmp_path, monkeypatch):
    for index in range(3):
        monkeypatch.setattr(Share, "of", classmethod(lambda cls, mesh, index=index: cls(index, 3)))
        assert regenerate(pair, prompts(), CONFIG, tmp_path) == (index == 2)
    assert read(tmp_path) == read(whole)


def test_a_prompt_has_its_own_draws_whatever_else_there_is(pair, whole, tmp_path):
    assert regenerate(pair, prompts()[:4], CONFIG, tmp_path)
    assert read(tmp_path) == read(whole)[:4]


@pytest.mark.slow
def test_a_drafter_changes_nothing(whole, tmp_path):
    assert regenerate(make_pair(drafter=True), prompts(), CONFIG, tmp_path)
    assert read(tmp_path) == read(whole)


@pytest.mark.slow
def test_a_run_that_is_killed_loses_and_doubles_nothing(whole, tmp_path, children_share_programs):
    """Killed in the middle of writing a file, then as the next batch is decoded; each time it goes on."""
    script = (
        "import os, pathlib, signal, sys\n"
        "from train import records, regenerate\n"
        "from tests.train import test_regenerate as test\n"
        "kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "count = iter(range(9))\n"
        "if sys.argv[2] == 'writing':\n"
        "    pathlib.Path.replace = lambda path, to: kill() if '000001' in path.name else os.replace(path, to)\n"
        "else:\n"
        "    made = regenerate.write_batch\n"
        "    regenerate.write_batch = lambda *given: kill() if next(count) else made(*given)\n"
        "regenerate.regenerate(test.make_pair(), test.prompts(), test.CONFIG, pathlib.Path(sys.argv[1]))\n"
    )
    kept = []
    for moment in ("writing", "decoding"):
        found = subprocess.run([sys.executable, "-c", script, tmp_path, moment], env={**os.environ}, timeout=120)
        assert found.returncode == -signal.SIGKILL
        kept.append(sorted(path.name for path in tmp_path.glob("*.jsonl")))
    assert kept == [["000000.jsonl"], ["000000.jsonl", "000001.jsonl"]]
    before = (tmp_path / "000000.jsonl").stat().st_mtime_ns
    assert regenerate(make_pair(), prompts(), CONFIG, tmp_path)
    assert (tmp_path / "000000.jsonl").stat().st_mtime_ns == before
    assert read(tmp_path) == read(whole)


def test_sigterm_ends_after_the_batch_under_way(pair, whole, tmp_path, monkeypatch):
    made = module.write_batch

    def write_batch(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return made(*given)

    monkeypatch.setattr(module, "write_batch", write_batch)
    assert not regenerate(pair, prompts(), CONFIG, tmp_path)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["000000.jsonl"]


def test_prompts_that_need_the_same_shapes_are_decoded_together():
    lengths = np.random.default_rng(0).integers(1, 4000, 500).tolist()
    config = RegenerateConfig(longest=3000, response=500, batch=16)
    batches = plan(lengths, config, width=8)
    assert sorted(i for batch in batches for i in batch.ids) == [i for i, x in enumerate(lengths) if x <= 3000]
    shapes = [{capacity(lengths[i] + 508) for i in batch.ids} for batch in batches]
    assert all(len(shape) == 1 for shape in shapes)
    assert len(set().union(*shapes)) == len({capacity(x + 508) for x in lengths if x <= 3000})
    assert all(len(batch.ids) <= 16 for batch in batches)
    assert all(len({is_sampled(config, i) for i in batch.ids}) == 1 for batch in batches)
    assert {is_sampled(config, batch.ids[0]) for batch in batches} == {False, True}
    assert all(lengths[a] <= lengths[b] for batch in batches for a, b in pairwise(batch.ids))


def test_a_folder_of_other_responses_is_refused(pair, whole):
    with pytest.raises(InputError, match="holds responses made with another response; give a new folder"):
        regenerate(pair, prompts(), dataclasses.replace(CONFIG, response=9), whole)
    with pytest.raises(InputError, match="holds responses made with another prompts"):
        regenerate(pair, prompts(9), CONFIG, whole)
    with pytest.raises(InputError, match="holds responses made with another stop"):
        regenerate(pair, prompts(), dataclasses.replace(CONFIG, stop=(4,)), whole)
    with pytest.raises(InputError, match="none of 2 prompts has up to 12 tokens"):
        regenerate(pair, [[5] * 13] * 2, CONFIG, whole)


def test_stop_tokens_end_responses_beside_the_target_s_own(pair, tmp_path):
    stop = tuple(range(2, 12))
    assert regenerate(pair, prompts(), dataclasses.replace(CONFIG, stop=stop), tmp_path)
    made = [(line["tokens"][line["prompt"] :], line["finish_reason"]) for line in read(tmp_path)]
    assert any(tokens[-1] in stop for tokens, _ in made)
    for tokens, reason in made:
        assert not {END, *stop} & set(tokens[:-1])
        assert (reason == "stop") == (tokens[-1] in (END, *stop))


def test_settings_that_change_no_response_are_not_looked_at(pair, whole, monkeypatch):
    """So a folder that was begun before they existed goes on."""
    monkeypatch.setattr(module, "write_batch", lambda *given: pytest.fail("writes again"))
    assert not {"own_prompts", "own_openings", "stop"} & json.loads((whole / "made_from.json").read_text()).keys()
    assert regenerate(pair, prompts(), dataclasses.replace(CONFIG, own_prompts=7, own_openings=("A",)), whole)
