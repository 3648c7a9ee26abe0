"""`--program train`: the training step over shapes, against counts by hand, and compiled where a compiler is."""

import dataclasses
import json

import pytest
from jax.sharding import AbstractMesh

from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.errors import InputError
from dflash_jax.plan import Request, plan
from dflash_jax.sharding import MESH_AXES
from dflash_jax.topology import CHIPS, has_compiler
from tests.test_plan import BIG, SMALL, SMALL_DRAFTER
from train.plan import TrainPlan, build, planned

CONFIG = TrainPlan()
CONFIG = dataclasses.replace(CONFIG, objective=dataclasses.replace(CONFIG.objective, anchors=8))


def configurations() -> tuple[dict, dict]:
    target = json.loads(BIG["target"].read_text())
    target["text_config"] |= SMALL
    return target, json.loads(BIG["drafter"].read_text()) | SMALL_DRAFTER


def program(batch: int = 8, context: int = 512, config: TrainPlan = CONFIG, selector: int = 0, **sizes):
    target, drafter = configurations()
    target, drafter = TargetConfig.from_dict(target), DrafterConfig.from_dict(drafter)
    drafter = dataclasses.replace(drafter, selector_rank=selector)
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    made, parts = planned(target, drafter, mesh, batch, context, config)
    return target, drafter, made, {part.name: part for part in parts}


def test_moments_are_spread_as_their_parameters_are():
    _, _, made, _ = program(fsdp=2, expert=2, tensor=2)
    params = {leaf.path.removeprefix("drafter/"): leaf for leaf in made.weights if leaf.path.startswith("drafter/")}
    found = set()
    for leaf in made.cache:
        name = next((name for name in params if leaf.path.endswith("/" + name)), None)
        if name is not None:
            assert (leaf.shape, leaf.local) == (params[name].shape, params[name].local)
            found.add(name)
    assert found == set(params)
    assert sum(leaf.bytes for leaf in made.cache) >= sum(leaf.bytes for leaf in params.values())


def test_products_against_a_count_by_hand():
    target, drafter, made, parts = program()
    tokens, rows = 8 * 512, 8 * 8 * 16
    D, F, N, K, H = 256, 512, 4, 4, 128
    block = rows * (D * N * H + N * H * D + 3 * D * F)
    shared = (rows + tokens) * D * 2 * K * H
    fused = tokens * 2 * D * D
    products = 2 * 4 * (2 * (block + shared) + fused)  # two layers; forward twice, backward twice
    assert drafter.sliding_window == 256
    seen = 256 * (1 - 256 / 1024) + 16, 256 + 16  # of 512 positions in a window, and in all
    products += 2 * 9 * rows * N * H * sum(seen)
    extra = parts["drafter"].flops - products
    assert 0 <= extra <= 0.02 * products  # convolutions, where the published drafter has them
    assert parts["drafter head"].flops == 4 * rows * 15 / 16 * target.vocab_size * D
    assert parts["optimizer"].bytes == 28 * sum(x.elements for x in made.weights if x.path.startswith("drafter/"))
    assert parts["optimizer"].sent == 0


def test_micro_batches_gather_and_read_weights_anew():
    (_, _, made, once), (_, _, _, twice) = program(fsdp=4), program(fsdp=4, config=dataclasses.replace(CONFIG, parts=2))
    for name, part in once.items():
        assert twice[name].flops == part.flops
    drafter = sum(leaf.elements for leaf in made.weights if leaf.path.startswith("drafter/"))
    assert twice["experts"].bytes == 2 * once["experts"].bytes
    assert twice["experts"].sent == 2 * once["experts"].sent > 0
    assert twice["optimizer"].bytes - once["optimizer"].bytes == 16 * drafter  # two sums of gradients


def test_two_losses_in_micro_batches_go_back_twice():
    parted = dataclasses.replace(CONFIG, parts=2)
    found = [program(config=config, selector=16)[3] for config in (CONFIG, parted)]
    once, twice = (parts["drafter"].flops for parts in found)
    assert twice / once == pytest.approx(7 / 4, rel=0.02)  # forward once; twice backward, and forward again
    assert found[1]["drafter head"].flops == 1.5 * found[0]["drafter head"].flops


def test_what_does_not_divide_is_refused():
    with pytest.raises(InputError, match="the batch is 6 sequences, which the mesh's data x fsdp = 4 and 1 micro"):
        program(batch=6, data=2, fsdp=2)
    target, drafter = (
        kind.from_dict(x) for kind, x in zip((TargetConfig, DrafterConfig), configurations(), strict=True)
    )
    mesh = AbstractMesh((1, 1, 1, 1), MESH_AXES)
    with pytest.raises(InputError, match="give a multiple of 3"):
        build(target, drafter, mesh, 8, 512, dataclasses.replace(CONFIG, parts=3))


@pytest.fixture
def paths(tmp_path):
    for name, values in zip(("target", "drafter"), configurations(), strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    return {name: tmp_path / f"{name}.json" for name in ("target", "drafter")}


def request(paths, **extra) -> Request:
    return Request(**paths, topology="v5e:2x2", mesh="fsdp=2,expert=2", program="train", batch=4, context=512, **extra)


def test_a_plan_of_the_step(paths):
    made = plan(request(paths, compile=False), planned)
    assert made["rows"] == 512 * 16
    assert {row["name"] for row in made["roofline"]["parts"]} >= {"drafter", "drafter head", "optimizer", "experts"}
    assert made["memory"]["cache"] > made["memory"]["weights"] / 10
    with pytest.raises(InputError, match=r"the program train is that of the trainers"):
        plan(request(paths, compile=False))


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(CHIPS["v5e"]), reason="needs the aot extra")
def test_the_step_compiles_for_a_tpu_without_logits_in_memory(paths):
    made = plan(request(paths), planned)
    assert made["compiled"]["vocabulary_temporaries"] == []
    assert made["compiled"]["kernels"]["tpu_custom_call"] > 0
    assert made["memory"]["fits"]
