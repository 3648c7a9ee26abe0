"""`dflash plan`: the roofline against counts by hand, refusals, and what the compilers say of a small model's round.

Nothing but the last tests needs a compiler for accelerators.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_jax import cli
from dflash_jax.abstract import build
from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.errors import InputError
from dflash_jax.plan import Request, part_of, plan, reason
from dflash_jax.roofline import chosen_share, roofline
from dflash_jax.sharding import abstract_mesh
from dflash_jax.topology import CHIPS, has_compiler

CONFIGS = Path(__file__).parents[1] / "docs" / "configs"
BIG = {"target": CONFIGS / "qwen3.5-397b-a17b.json", "drafter": CONFIGS / "qwen3.5-397b-a17b-dflash.json"}

SMALL = {  # of the family of the big one, one layer of each kind twice
    "hidden_size": 256, "head_dim": 128, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "num_experts": 32,
    "moe_intermediate_size": 128, "num_attention_heads": 4, "num_experts_per_tok": 4, "vocab_size": 10240,
    "shared_expert_intermediate_size": 128, "num_hidden_layers": 4, "eos_token_id": 1,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
SMALL_DRAFTER = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 2, "num_target_layers": 4, "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 256, "vocab_size": 10240,
    "dflash_config": {"block_size": 16, "mask_token_id": 5, "target_layer_ids": [0, 2]},
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Paths of a small target's and its drafter's configurations."""
    folder = tmp_path_factory.mktemp("small")
    target = json.loads(BIG["target"].read_text())
    target["text_config"] |= SMALL
    drafter = json.loads(BIG["drafter"].read_text()) | SMALL_DRAFTER
    for name, values in (("target", target), ("drafter", drafter)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values))
    return {"target": folder / "target", "drafter": folder / "drafter" / "config.json"}  # a folder, and a file


def parts_of(paths, kind="round", batch=1, context=1024, width=16, **sizes):
    target, drafter = (json.loads(_file(paths[name]).read_text()) for name in ("target", "drafter"))
    target, drafter = TargetConfig.from_dict(target), DrafterConfig.from_dict(drafter)
    program = build(target, drafter, abstract_mesh(**sizes), kind, batch, context, width)
    found = roofline(target, None if kind == "plain" else drafter, program, program.rows)
    return program, {part.name: part for part in found}


def _file(path):
    return path / "config.json" if path.is_dir() else path


@pytest.mark.slow
def test_the_published_pair_has_its_published_sizes():
    program, _ = parts_of(BIG)
    elements = {name: sum(w.elements for w in program.weights if w.path.startswith(name)) for name in ("t", "d")}
    assert round(elements["t"] / 1e9, 2) == 396.35
    assert elements["d"] == 1_291_904_512


@pytest.mark.slow
def test_drafting_is_a_small_share_of_a_round_of_the_published_pair():
    """Batch 1 on 8 chips of tpu7x: at most 8% of the roofline time."""
    request = Request(**BIG, topology="tpu7x:2x2x2", mesh="expert=4,tensor=4", compile=False)
    result = plan(request)
    assert 0 < result["roofline"]["drafter_share"] <= 0.08
    assert result["memory"]["fits"]


def test_weights_are_read_once(small):
    """Of the drafter's key and value projections twice: for the block, and for the context."""
    program, parts = parts_of(small, context=256)
    sizes = {w.path: w.bytes for w in program.weights}
    head = sizes["target/lm_head/kernel"] + sizes["target/norm/weight"]
    assert parts["head"].bytes == head + 16 * 256 * 2  # and the rows of the embedding
    assert parts["drafter head"].bytes == sizes["target/lm_head/kernel"]
    drafter = sum(size for path, size in sizes.items() if path.startswith("drafter/"))
    cached = 2 * 2 * 4 * 128 * 2 * (256 + 16)  # keys and values of 2 layers of 4 heads: read, and the rows written
    assert parts["drafter"].bytes == drafter + sizes["drafter/kv_proj/kernel"] + cached


def test_recurrent_state_is_read_and_written_once(small):
    program, parts = parts_of(small)
    weights = sum(w.bytes for w in program.weights if "mixer" in w.path and w.path.split("/")[2] in ("0", "2"))
    norms = sum(w.bytes for w in program.weights if w.path.endswith(("0/input_norm/weight", "2/input_norm/weight")))
    norms -= sum(w.bytes for w in program.weights if w.path == "drafter/layers/0/input_norm/weight")
    state = sum(c.bytes for c in program.cache if c.path.split("/")[:2] in (["target", "0"], ["target", "2"]))
    assert parts["recurrent layers"].bytes == weights + norms + 2 * state


def test_experts_are_read_when_they_are_chosen(small):
    _, one = parts_of(small, "plain")
    _, many = parts_of(small, batch=64)
    program, block = parts_of(small)
    experts = sum(w.bytes for w in program.weights if "/experts/" in w.path)
    rest = sum(
        w.bytes for w in program.weights if w.path.startswith("target") and ("mlp" in w.path or "post" in w.path)
    )
    rest -= experts
    assert one["experts"].bytes == pytest.approx(rest + experts * 4 / 32)
    assert block["experts"].bytes == pytest.approx(rest + experts * (1 - (1 - 4 / 32) ** 16))
    assert many["experts"].bytes == pytest.approx(rest + experts)


def test_chosen_share_agrees_with_drawing():
    import numpy as np

    draw = np.random.default_rng(0)
    drawn = [len({e for _ in range(16) for e in draw.choice(64, 6, replace=False)}) / 64 for _ in range(400)]
    assert chosen_share(64, 6, 16) == pytest.approx(np.mean(drawn), abs=0.01)


def test_products_are_counted_for_every_row(small):
    _, one = parts_of(small, batch=1)
    _, eight = parts_of(small, batch=8)
    for name, part in one.items():
        assert eight[name].flops == pytest.approx(8 * part.flops), name


@pytest.mark.parametrize(
    ("sizes", "name", "divided"),
    [
        ({"tensor": 2}, "recurrent layers", 2),
        ({"tensor": 2}, "drafter", 2),
        ({"expert": 4}, "experts", 4),
        ({"expert": 2, "tensor": 2}, "head", 4),
    ],
)
def test_a_mesh_divides_what_its_axes_are_for(small, sizes, name, divided):
    _, whole = parts_of(small)
    _, split = parts_of(small, **sizes)
    assert split[name].bytes == pytest.approx(whole[name].bytes / divided, rel=0.2)
    assert split[name].bytes < whole[name].bytes
    assert split[name].sent > 0 == whole[name].sent


def test_a_window_bounds_what_the_drafter_reads(small):
    """One of the two layers is sliding: from its window on, only the other one grows with the context."""
    read = [parts_of(small, context=context)[1]["drafter"].bytes for context in (512, 1024)]
    assert read[1] - read[0] == 2 * 4 * 128 * 2 * 512  # keys and values of one layer


def test_the_sequences_are_spread_over_the_data_axis(small):
    _, whole = parts_of(small, batch=1)
    _, split = parts_of(small, batch=4, data=4)
    assert split["target attention"].bytes == whole["target attention"].bytes


def test_the_speed_up_is_that_of_the_rooflines(small):
    facts = {"topology": "v5e:2x2", "mesh": "expert=2,tensor=2", "context": 1024, "compile": False}
    round_, plain = (plan(Request(**small, program=kind, **facts)) for kind in ("round", "plain"))
    speedup = round_["speedup"]
    assert speedup["plain_seconds"] == pytest.approx(plain["roofline"]["seconds"], rel=0.02)
    assert speedup["round_seconds"] == round_["roofline"]["seconds"]
    assert speedup["speedup"] == pytest.approx(4 * speedup["plain_seconds"] / speedup["round_seconds"])
    assert speedup["break_even"] == pytest.approx(4 / speedup["speedup"])


def test_a_prefill_is_planned_by_the_chunk(small):
    result = plan(Request(**small, program="prefill", topology="v5e:2x2", context=1024, compile=False))
    assert result["rows"] == 128
    assert {part["name"] for part in result["roofline"]["parts"]} >= {"experts", "recurrent layers", "drafter"}
    json.dumps(result)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mesh": "expert=3,tensor=2"}, "6 devices and there are 4"),
        ({"mesh": "expert=4,pipeline=1"}, "give sizes of data, fsdp, expert, tensor"),
        ({"mesh": "tensor=64", "topology": "v6e:8x8"}, "does not divide"),
        ({"mesh": "data=4"}, "data 4 does not divide the batch, which is 1"),
        ({"topology": "v7:2x2"}, "unknown chip"),
        ({"program": "rounds"}, "it can be round, plain, prefill, train"),
        ({"program": "train", "drafter": None}, "a training step needs a drafter"),
        ({"batch": 0}, "the batch is 0"),
        ({"context": 1}, "the context is 1"),
        ({"context": 10**7}, "is 10000000 tokens, and the target takes 262144 positions"),
        ({"width": 17}, "from 1 to 16"),
        ({"acceptance_length": 0.5}, "at least 1 token"),
        ({"width": 4, "acceptance_length": 5.0}, "a round has 4 rows"),
        ({"drafter": None}, "a round needs a drafter"),
        ({"target": Path("/nowhere")}, "not a folder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(small, changed, said):
    given = {**small, "topology": "v5e:2x2", "mesh": "expert=4", "context": 1024, "compile": False}
    with pytest.raises(InputError) as refusal:
        plan(Request(**(given | changed)))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_drafter_of_another_target_is_refused(small):
    with pytest.raises(InputError, match="hidden size"):
        plan(Request(target=small["target"], drafter=BIG["drafter"], topology="v5e:2x2", compile=False))


def test_scopes_say_the_part(small):
    target = TargetConfig.from_dict(json.loads(_file(small["target"]).read_text()))
    assert part_of("jit(one_round)/verify/layer0/mixer/dot", target) == "recurrent layers"
    assert part_of("jit(one_round)/verify/layer1/mixer/dot", target) == "target attention"
    assert part_of("jit(one_round)/verify/layer1/mlp/dot", target) == "experts"
    assert part_of("jit(one_round)/propose/draft1/dot", target) == "drafter"
    assert part_of("jit(one_round)/propose/dot", target) == "drafter head"
    assert part_of("jit(one_round)/verify/dot", target) == "head"


def test_the_command_prints_json_or_tables(small, capsys):
    given = ["plan", "--target", str(small["target"]), "--drafter", str(small["drafter"]), "--no-compile"]
    given += ["--topology", "v5e:2x2", "--mesh", "expert=2,tensor=2", "--context", "1024", "--batch", "2"]
    assert cli.main([*given, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mesh"] == {"expert": 2, "tensor": 2}
    assert result["compiled"] is None
    assert cli.main(given) == 0
    shown = capsys.readouterr().out
    assert "recurrent layers" in shown
    assert "not compiled" in shown
    assert cli.main([*given, "--mesh", "expert=64"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_says_what_to_install(small, capsys, monkeypatch):
    monkeypatch.setattr("dflash_jax.topology._installed", lambda module: False)
    assert cli.main(["plan", "--target", str(small["target"]), "--topology", "v5e:2x2"]) == 2
    assert "pip install 'dflash-jax[aot]'" in capsys.readouterr().err


needs_tpu_compiler = pytest.mark.skipif(not has_compiler(CHIPS["v5e"]), reason="needs the aot extra")


@pytest.fixture(scope="module")
def compiled(small):
    return plan(Request(**small, topology="tpu7x:2x2x1", mesh="expert=4,tensor=2", context=1024, batch=2))


@needs_tpu_compiler
@pytest.mark.slow
def test_a_compiled_round_agrees_with_what_was_computed(compiled):
    memory, found = compiled["memory"], compiled["compiled"]
    assert memory["fits"]
    assert found["memory"]["argument"] == pytest.approx(memory["arguments"], rel=0.1)  # padded, and the tokens
    assert found["bytes_accessed"] > compiled["roofline"]["bytes"] * 0.5
    assert found["estimated_cycles"]["recurrent layers"] > 0
    assert {"all-reduce"} <= {row["kind"] for row in found["collectives"]}
    assert all(row["devices"] in (2, 4, 8) for row in found["collectives"])
    json.dumps(compiled)


@needs_tpu_compiler
@pytest.mark.slow
def test_a_compiled_round_gathers_no_weights(compiled):
    assert compiled["compiled"]["weight_all_gathers"] == []


@needs_tpu_compiler
@pytest.mark.slow
def test_a_compiled_round_writes_no_logits(compiled):
    assert compiled["compiled"]["vocabulary_temporaries"] == []


@needs_tpu_compiler
@pytest.mark.slow
def test_what_is_too_large_is_not_compiled():
    result = plan(Request(**BIG, topology="v5e:2x2", mesh="tensor=4"))
    assert result["compiled"] is None
    assert not result["memory"]["fits"]


ROUND = """
import json, sys
from dflash_jax.plan import Request, plan
found = plan(Request(target=sys.argv[1], drafter=sys.argv[2], topology="a100:1", context=512, batch=2))
print(json.dumps(found["compiled"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(CHIPS["a100"]), reason="needs the aot extra")
def test_a_round_compiles_for_a_card_without_kernels(small):
    """In a process of its own: the compiler keeps the first card that it sees."""
    given = [sys.executable, "-c", ROUND, str(small["target"]), str(small["drafter"])]
    done = subprocess.run(given, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["memory"]["argument"] > 0
    assert "gated_delta on NVIDIA A100-SXM4-80GB: the reference" in done.stderr


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("RESOURCE_EXHAUSTED: Used 40G of 32G hbm.\nLargest:\n  x", "RESOURCE_EXHAUSTED: Used 40G of 32G hbm."),
        ("E1001: Oom:\n Ran out of vmem for %gmm.2\nSee", "E1001: Oom: Ran out of vmem for %gmm.2"),
        ("E1001: Oom:\n" + "x" * 500, "E1001: Oom: " + "x" * 287 + "…"),
    ],
)
def test_what_the_compiler_ran_out_of_is_said_in_one_line(text: str, line: str):
    assert reason(RuntimeError(text)) == line
