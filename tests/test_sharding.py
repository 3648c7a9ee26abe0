"""The rule table, and generations that do not depend on the mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dflash_jax.checkpoints import load_target
from dflash_jax.errors import InputError
from dflash_jax.pair import load
from dflash_jax.sharding import make_mesh, mesh_sizes, spec
from tests import sharded
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
MESHES = [{"data": 8}, {"expert": 8}, {"tensor": 8}, {"expert": 4, "tensor": 2}, {"data": 2, "expert": 2, "tensor": 2}]


def test_axes_go_where_the_table_says():
    sizes = {"data": 2, "fsdp": 1, "expert": 4, "tensor": 2}
    assert spec(("embed", ("heads", 4)), (64, 32), sizes) == P(None, "tensor")
    assert spec(("experts", None, None, "mlp"), (8, 64, 2, 16), sizes) == P("expert", None, None, "tensor")
    assert spec(("vocab", None), (16, 64), sizes) == P(("expert", "tensor"), None)
    assert spec(("batch", None), (4, 3), sizes | {"fsdp": 2}) == P(("data", "fsdp"), None)


def test_few_kv_heads_are_whole_on_every_device():
    assert spec(("embed", ("kv_heads", 2)), (64, 16), {"tensor": 8}) == P(None, None)
    assert spec(("embed", ("kv_heads", 2)), (64, 16), {"tensor": 2}) == P(None, "tensor")


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "message"),
    [
        (("embed", ("heads", 6)), (64, 48), {"tensor": 4}, "tensor 4 does not divide heads, which is 6"),
        (("embed", ("kv_heads", 2)), (64, 16), {"tensor": 3}, "tensor 3 does not divide kv_heads, which is 2"),
        (("vocab", None), (20, 64), {"expert": 4, "tensor": 2}, "expert 4 x tensor 2 does not divide vocab"),
        (("heads", "mlp"), (8, 8), {"tensor": 2}, "two axes of one array on the mesh's tensor"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(axes, shape, sizes, message):
    with pytest.raises(InputError, match=message):
        spec(axes, shape, sizes)


def test_a_mesh_in_words():
    assert mesh_sizes("expert=4,tensor=2") == {"expert": 4, "tensor": 2}
    assert mesh_sizes("") == {}
    for text in ("experts=4", "expert", "expert=x", "tensor=2,tensor=2"):
        with pytest.raises(InputError, match="as in expert=4,tensor=2"):
            mesh_sizes(text)


def test_bad_meshes_are_refused():
    with pytest.raises(InputError, match="a mesh of tensor 3 has 3 devices and there are 1"):
        make_mesh(tensor=3)
    with pytest.raises(InputError, match="a mesh has no axis model; its axes are data, fsdp, expert, tensor"):
        make_mesh(model=1)
    with pytest.raises(InputError, match="the mesh has an axis model"):
        load(mesh=jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pair")
    sharded.write_pair(path)
    return path


@pytest.fixture(scope="module")
def expected(folder):
    return json.loads(json.dumps(sharded.outputs(folder, None)))


def start(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.sharded", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    log, _ = process.communicate(timeout=500)
    assert process.returncode == 0, log


def test_the_case_drafts_and_varies(expected):
    """Else equal outputs would say little."""
    for settings in expected:
        for tokens, lengths, _ in settings:
            assert len(tokens) == 24 and len(set(tokens)) > 4
            assert 1 in lengths
        assert any(max(lengths) > 1 for _, lengths, _ in settings)


@pytest.fixture(scope="module")
def spread(folder, tmp_path_factory):
    """The outputs on all meshes."""
    path = tmp_path_factory.mktemp("meshes") / "out.json"
    finish(start(folder, path, *map(json.dumps, MESHES)))
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mesh_gives_the_tokens_of_one_device(expected, spread, mesh):
    """Greedy and sampling, 8 devices; 5 prompts on 2 or 8 parts of the batch leave some of them idle."""
    assert spread[json.dumps(mesh)] == expected


@pytest.mark.slow
def test_two_processes_generate_together(folder, expected, tmp_path):
    port = free_port()
    mesh = json.dumps({"data": 2, "expert": 2, "tensor": 2})
    both = [start(folder, tmp_path / f"{i}.json", mesh, "--process", i, port) for i in range(2)]
    for process in both:
        finish(process)
    for i in range(2):
        assert json.loads((tmp_path / f"{i}.json").read_text()) == {mesh: expected}


def test_a_mesh_that_does_not_divide_the_model_is_refused_in_one_line(folder):
    mesh = jax.sharding.AbstractMesh((5, 1), ("expert", "tensor"))
    with pytest.raises(
        InputError, match="the mesh's expert 5 does not divide vocab, which is 16; give a mesh that does"
    ):
        load_target(folder / "target", mesh=mesh)
