"""The benchmarks measure what they say: their PyTorch loop is right, their sums are right."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from benchmarks.pair import totals

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
