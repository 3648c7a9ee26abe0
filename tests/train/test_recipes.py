"""Every recipe reads, fits its target, has the published drafter's size, and divides over its pod's mesh."""

import math
from functools import cache
from pathlib import Path

import jax
import pytest
from flax import nnx

import train
from dflash_jax.config import DrafterConfig, TargetConfig, read_json
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target
from dflash_jax.pair import check_fit
from dflash_jax.plan import plan
from dflash_jax.sharding import RULES, param_axes, spec
from dflash_jax.topology import parse_topology
from train.configuration import read_config
from train.plan_recipe import planned_recipe
from train.run import DrafterRun

RECIPES = sorted((Path(train.__file__).parent / "recipes").glob("*.yaml"))
CONFIGS = Path(__file__).parents[2] / "docs" / "configs"
# Parameters of the published DFlash drafters, from their files' sizes.
SIZES = {
    "qwen3.5-397b-a17b": 1_291_904_512,
    "qwen3.5-35b-a3b": 385_906_176,
    "qwen3-coder-30b-a3b": 473_995_264,
    "gpt-oss-120b": 784_767_104,
    "qwen3-8b": 1_048_626_432,
}


def read(path: Path) -> tuple[str, bool, DrafterRun, TargetConfig, DrafterConfig]:
    """(model, whether DFlash 2, the run, its target, its drafter)."""
    model, _, form = path.stem.rpartition("-")
    run = read_config(DrafterRun, path)
    target = TargetConfig.from_dict(read_json(CONFIGS / f"{model}.json"))
    assert run.mask_token is not None
    return model, form == "dflash2", run, target, run.training.architecture.drafter_config(target, run.mask_token)


@cache
def weights(kind: type[Target] | type[Drafter], config: TargetConfig | DrafterConfig) -> nnx.State:
    """The parameters of a model, without values."""
    return nnx.state(shapes_of(lambda rngs: kind(config, rngs=rngs)))


def test_there_is_a_recipe_for_every_model_in_both_forms():
    assert {path.stem for path in RECIPES} == {f"{model}-{form}" for model in SIZES for form in ("dflash", "dflash2")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_drafter_fits_and_has_the_published_size(path):
    model, second, run, target, drafter = read(path)
    check_fit(target, drafter)
    assert DrafterConfig.from_dict(drafter.to_dict()) == drafter
    state = weights(Drafter, drafter)
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(state))
    D, V = drafter.hidden_size, drafter.vocab_size
    convolutions = drafter.num_layers * 2 * (2 * 2 * D + D * (2 * 2 * D // drafter.conv_group_size))
    assert size == SIZES[model] + second * (convolutions + 2 * V * 256 + D * 256)
    assert run.training.loss == ("dpace" if second else "decay") and run.training.compute == "bfloat16"
    assert run.training.gamma == {16: 7, 10: 5}[drafter.block_size]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_mesh_is_the_pod_s_and_divides_models_and_batch(path):
    _, _, run, target, drafter = read(path)
    assert run.pod is not None and f"# For {run.pod} " in path.read_text()
    sizes = dict(vars(run.mesh))
    assert math.prod(sizes.values()) == parse_topology(run.pod).num_devices
    assert run.training.batch % math.prod(sizes[axis] for axis in RULES["batch"]) == 0
    assert 2.4e5 <= run.training.batch * run.data.length <= 3e5
    for state in (weights(Target, target), weights(Drafter, drafter)):
        for _, variable in nnx.to_flat_state(state):
            shape = variable.get_value().shape
            spec(param_axes(variable, shape), shape, sizes)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_plan_is_of_its_own_sizes_and_leaves_room_on_the_pod(path):
    model, _, run, _, drafter = read(path)
    request, trained = planned_recipe(path, target=str(CONFIGS / f"{model}.json"), compile=False)
    made = plan(request, trained)
    assert (request.batch, request.context) == (run.training.batch, run.data.length)
    assert made["rows"] == run.training.anchors * drafter.block_size
    assert made["memory"]["arguments"] < 0.6 * made["memory"]["hbm"]
    # The drafter alone, without attention: three or four products of every row with every weight.
    state = weights(Drafter, drafter)
    layers = sum(math.prod(x.shape) for x in jax.tree.leaves(state["layers"]) if len(x.shape) > 1)
    rows = run.training.batch * run.training.anchors * drafter.block_size / made["devices"]
    assert made["roofline"]["flops"] > (6 + 2 * run.training.remat) * layers * rows


def test_a_recipe_without_a_pod_needs_a_topology(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"target: {CONFIGS / 'qwen3-8b.json'}\nmesh: {{fsdp: 4}}\n")
    with pytest.raises(InputError, match="names no pod; give --topology"):
        planned_recipe(recipe)
    assert planned_recipe(recipe, topology="v5e:2x2")[0].mesh == "fsdp=4"
