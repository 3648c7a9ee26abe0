"""What configurations tell is refused before a weight is read, and by `dflash train --check` as well."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

import dflash_jax
from dflash_jax import cli
from dflash_jax.checkpoints import save_drafter
from dflash_jax.config import TargetConfig, load_config
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target
from dflash_jax.sharding import abstract_mesh, check_layout
from tests.train import runs
from train.architecture import DrafterArchitecture
from train.checks import check_run
from train.configuration import read_config
from train.run import DrafterRun, main, respond


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    runs.target_folder(folder / "target")
    runs.prompts_file(folder / "prompts.jsonl", 4)
    runs.config_file(folder / "run.yaml", folder / "target", folder / "prompts.jsonl", folder / "out")
    other = DrafterArchitecture(2, 2, 1, 8, 24, 4, taps=2)
    config = other.drafter_config(TargetConfig.from_dict(load_config(folder / "target")), 1)
    save_drafter(Drafter(config, rngs=nnx.Rngs(0)), folder / "other", jnp.float32)
    same = DrafterArchitecture(1, 2, 1, 8, 16, 4, taps=2, selector_rank=4)
    config = same.drafter_config(TargetConfig.from_dict(load_config(folder / "target")), 1)
    save_drafter(Drafter(config, rngs=nnx.Rngs(0)), folder / "selecting", jnp.float32)
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text("\n  \n")
    return folder


WRONG = {
    "mask_token=5000": r"mask token is 5000; the target's tokens are 0 to \d+",
    "mask_token=-1": "mask token is -1",
    "training.architecture.tap_ids=[0,99]": r"taps layers \[0, 99\]; the target's layers are 0 to",
    "training.architecture.num_kv_heads=3": "num_heads 2 is not a multiple of num_kv_heads 3",
    "data.length=4096": "data.length is 4096, and target takes 2048 positions; give at most 2048",
    "mesh.tensor=3": "the mesh's tensor 3 does not divide",
    "mesh.expert=5": "the mesh's expert 5 does not divide vocab, which is 259",
    "mesh.data=3": "the batch is 4 sequences, which the mesh's data x fsdp = 3 and 1 micro batches do not divide",
    "mesh.tensor=0": "mesh.tensor is 0; give at least 1",
    "training.parts=3": "fsdp = 1 and 3 micro batches do not divide; give a multiple of 3",
    "training.parts=0": "training.parts is 0; give at least 1",
    "training.vocabulary=128": "vocabulary of a step is 128 tokens; give more than the 384 of its rows",
    "training.loss=opd data.taps=cache": "train it without cached taps",
    "training.loss=opd training.vocabulary=64": "compares whole distributions; give vocabulary 0",
    "training.architecture.block_size=1": "block_size is 1; give at least 2",
    "training.architecture.block_size=97": "block_size is 97, and data.length 96; give a smaller block",
    "training.architecture.num_kv_heads=0": "num_kv_heads is 0; give at least 1",
    "training.architecture.head_dim=7": "head_dim is 7, and rotation takes its numbers in twos",
    "training.architecture.taps=0": "taps is 0; give at least 1",
    "training.architecture.taps=4": "taps is 4, and the target has 3 layers",
    "training.architecture.selector_rank=4 training.architecture.selector_top_k=260": "top_k is 260; give 1 to 259",
    "regenerate.stop=[259]": "stop holds 259; give texts of at least one character, or ids from 0 to 258",
    "regenerate.sampled=2": "regenerate.sampled is 2.0; give 0 to 1",
    "regenerate.own_prompts=2 regenerate.own_openings=[]": "own_openings is empty",
    "start={folder}/selecting": "for which the drafter to train has no place; give its sizes",
    "start={folder}/other": "has num_layers 2, and training.architecture 1; give its sizes",
    "start={folder}/none": "is not a folder",
    "regenerate.drafter={folder}/target": "is not a drafter",
    "data.prompts=[]": "data.prompts and data.responses are empty",
    "data.prompts=[{folder}/blank.jsonl]": "blank.jsonl is empty; give files",
    "data.prompts=[{folder}/none.jsonl]": "none.jsonl",
    "data.responses=[{folder}/empty.jsonl]": "empty.jsonl is empty; give files",
    "data.held_out=[{folder}/none.jsonl]": "none.jsonl",
}


@pytest.mark.parametrize("change", WRONG)
def test_a_run_that_cannot_end_well_does_not_begin(folder, change, monkeypatch, capsys):
    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr("dflash_jax.checkpoints.fill._read_leaf", read)
    given = change.format(folder=folder).split()
    run = read_config(DrafterRun, folder / "run.yaml", given)
    for begin in (main, respond):
        with pytest.raises(InputError, match=WRONG[change]) as refusal:
            begin(run)
        assert "\n" not in str(refusal.value)
    assert not Path(folder / "out").exists()
    assert cli.main(["train", "drafter", str(folder / "run.yaml"), *given, "--check"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_is_right_passes_the_check(folder, capsys):
    assert cli.main(["train", "drafter", str(folder / "run.yaml"), "--check"]) == 0
    assert "num_layers: 1" in capsys.readouterr().out
    assert not Path(folder / "out").exists()


def test_a_drafter_that_does_not_fit_is_refused_before_the_target_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dflash_jax.checkpoints.fill._read_leaf", lambda *_: pytest.fail("weights are read"))
    for change, message in (
        ({"hidden_size": 24}, "hidden size is 24"),
        ({"vocab_size": 77}, "vocabulary is 77"),
        ({"num_target_layers": 9}, "number of target layers is 9"),
    ):
        values = json.loads((folder / "other" / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(InputError, match=message):
            dflash_jax.load(folder / "target", tmp_path)


def test_a_mesh_has_to_divide_every_parameter(folder):
    target = TargetConfig.from_dict(load_config(folder / "target"))
    model = shapes_of(lambda rngs: Target(target, rngs=rngs))
    check_layout(model, abstract_mesh(expert=1, tensor=1))
    with pytest.raises(InputError, match="the mesh's tensor 8 does not divide"):
        check_layout(model, abstract_mesh(tensor=8))


@pytest.mark.slow
def test_a_run_does_not_go_on_in_the_folder_of_another(folder, tmp_path):
    """Responses and checkpoints of other settings are found before anything is read, and those of the same are not."""
    begun = [f"out={tmp_path}", "training.loop.steps=4"]
    assert main(read_config(DrafterRun, folder / "run.yaml", begun))
    for changes, message in (
        ((), None),
        (("regenerate.response=25",), "holds responses made with another response; give a new folder"),
        ((f"regenerate.drafter={folder}/other",), "holds responses made with another drafter, width"),
        (("training.architecture.intermediate_size=24",), "checkpoints in .* are of another model or optimiser"),
        (("training.optimizer.method=muon",), "checkpoints in .* are of another model or optimiser"),
    ):
        run = read_config(DrafterRun, folder / "run.yaml", [*begun, *changes])
        if message is None:
            check_run(run)
            continue
        with pytest.raises(InputError, match=message):
            check_run(run)
