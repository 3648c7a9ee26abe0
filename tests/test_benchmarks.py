"""The benchmarks measure what they say: their PyTorch loop is right, their sums are right."""

import json
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from benchmarks import kernels, rounds
from benchmarks.pair import Options, measure, totals
from dflash_jax.config import TargetConfig

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.torch
@pytest.mark.parametrize("case", ["dflash_full", "dflash_sliding", "dflash2"])
def test_the_torch_loop_is_the_reference_loop(case):
    """It drafts and accepts what the recorded reference run did, so its time is that of the reference's work."""
    pytest.importorskip("torch")
    from benchmarks.reference_torch import Reference

    expected = load_file(GOLDENS / case / "expected.safetensors")
    prompt, tokens = expected["prompt"].tolist(), expected["tokens"].tolist()
    out = Reference(GOLDENS / case / "target", GOLDENS / case / "drafter").generate(prompt, len(tokens) - len(prompt))
    assert prompt + out.tokens == tokens
    lengths = expected["acceptance_lengths"].tolist()
    # The recorded run goes one round on where the last token was emitted but not in its cache.
    assert out.acceptance_lengths == lengths[: len(out.acceptance_lengths)]
    assert len(lengths) - len(out.acceptance_lengths) <= 1


@pytest.mark.torch
@pytest.mark.parametrize("case", ["dflash_full", "dflash_sliding", "dflash2"])
def test_random_pairs_have_the_case_s_architecture(case, tmp_path):
    pytest.importorskip("torch")
    from benchmarks.random_pair import write_pair
    from benchmarks.reference_torch import Reference

    reference = Reference(*write_pair(case, tmp_path, hidden_size=128))
    small = load_file(GOLDENS / case / "drafter" / "model.safetensors")
    assert {*reference.drafter.state_dict(), *reference.drafter.selector} == small.keys()
    assert reference.target.config.hidden_size == 128
    out = reference.generate([1, 2, 3], 40)
    assert len(out.tokens) == 40
    assert len(set(out.tokens)) > 2


def row(tokens, rounds, length, rate, plain, identical=True):
    return {
        "tokens": tokens,
        "rounds": rounds,
        "acceptance_length": length,
        "tokens_per_second": rate,
        "plain_tokens_per_second": plain,
        "speedup": rate / plain,
        "identical": identical,
    }


def test_totals_weigh_by_work():
    """300 tokens in 1 + 4 s against 2 + 2 s: rates are of the whole, not means of rates."""
    total = totals([row(100, 50, 2.0, 100.0, 50.0), row(200, 25, 8.0, 50.0, 100.0, identical=False)])
    assert total["tokens_per_second"] == pytest.approx(60.0)
    assert total["plain_tokens_per_second"] == pytest.approx(75.0)
    assert total["speedup"] == pytest.approx(0.8)
    assert total["acceptance_length"] == pytest.approx(300 / 75)
    assert total["identical"] is False


def test_a_random_drafter_is_hardly_ever_right():
    found = [measure(Options(count=1, new_tokens=24, runs=1, random_drafter=random))[0] for random in (True, False)]
    assert all(row["identical"] for row in found)
    assert found[0]["acceptance_length"] < 1.2 < 1.6 < found[1]["acceptance_length"]


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4, "intermediate_size": 48,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
    "eos_token_id": 1,
}  # fmt: skip
SIZES = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 32, "block_size": 3}


@pytest.fixture
def sizes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"training": {"architecture": SIZES | {"tap_ids": [1, 3]}}}))
    return {"target": str(tmp_path / "config.json"), "recipe": str(tmp_path / "recipe.yaml")}


def test_rounds_of_random_models_are_timed(sizes):
    rows = rounds.measure(rounds.Options(**sizes, batches="2", widths="1,3", context=40, runs=1))
    assert [(row["batch"], row["width"], row["layers"]) for row in rows] == [(2, 1, 4), (2, 3, 4)]
    assert all(0 < row["seconds"] < 1 for row in rows)
    assert rows[1]["over_plain"] == rows[1]["seconds"] / rows[0]["seconds"]
    assert rows[0]["least_seconds"] is None  # no peaks are published for what runs this


@pytest.mark.parametrize(("layers", "taps"), [(None, (1, 3)), (2, (0, 1))])
def test_a_cut_target_is_tapped_where_it_has_layers(sizes, layers, taps):
    target, drafter = rounds.configurations(rounds.Options(**sizes, layers=layers))
    assert isinstance(target, TargetConfig)
    assert (target.num_layers, drafter.tap_ids, drafter.block_size) == (layers or 4, taps, 3)


@pytest.mark.parametrize("change", [{"target": "nowhere"}, {"batches": "a"}, {"widths": "1,0"}])
def test_rounds_refuse_what_cannot_be(sizes, capsys, monkeypatch, change):
    given = [f"--{name}={value}" for name, value in (sizes | change).items()]
    monkeypatch.setattr("sys.argv", ["rounds", *given])
    assert rounds.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def case(kernel, name):
    found = import_module(f"pallas_kernels.{kernel}.cases").cases()
    return next(c for c in found if name in c.name)


@pytest.mark.parametrize("kernel", kernels.kernels())
def test_every_case_says_what_its_whole_numbers_are(kernel):
    for one in import_module(f"pallas_kernels.{kernel}.cases").cases():
        shapes = [x.shape for x in jax.tree.leaves(one.arguments) if x.dtype == np.int32]
        assert [x.shape for x in one.whole] == shapes, one.name


def test_a_full_cache_is_what_attention_is_timed_with():
    arrays = kernels.filled(case("block_attention", "35B-A3B, batch 1, context 1K, W 16"))
    keys, lengths, table = arrays[1], arrays[5], arrays[6]
    assert lengths.tolist() == [1024 - 16]
    assert sorted(table.ravel().tolist()) == list(range(len(keys)))
    assert np.std(np.asarray(keys, np.float32)) == pytest.approx(1, rel=0.01)


def test_what_runs_the_reference_is_not_timed_as_a_kernel():
    taken = case("gated_delta", "35B-A3B, batch 1, W 16"), case("head_sampling", "greedy, batch 1, W 16")
    left = case("gated_delta", "35B-A3B, batch 1, W 16, tree"), case("head_sampling", "top-k, batch 1, W 16")
    assert [kernels.is_kernel(c, "gpu") for c in (*taken, *left)] == [True, True, False, False]


def test_a_wrong_kernel_is_a_failure(monkeypatch):
    chosen = case("gated_delta", "35B-A3B, batch 1, W 1")
    monkeypatch.setattr(kernels, "microseconds", lambda *given: 1.0)
    assert kernels.run(chosen, "reference", None, 1)["failure"] == ""
    honest = kernels.filled
    monkeypatch.setattr(kernels, "error", lambda *given: float("nan"))
    assert kernels.run(chosen, "reference", None, 1)["failure"] == "differs from the reference"
    monkeypatch.setattr(kernels, "filled", lambda case: honest(case)[:-1])
    assert kernels.run(chosen, "reference", None, 1)["failure"]  # what the call raised


def test_kernels_are_timed_on_accelerators_only(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["kernels"])
    assert kernels.main() == 2
    assert "no accelerator" in capsys.readouterr().out
