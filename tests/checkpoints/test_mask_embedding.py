"""A mask token's own embedding is read without running code, is the drafter's alone, and is written again."""

import os
import pickle
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dflash_jax.checkpoints import load_drafter, save_drafter
from dflash_jax.checkpoints.mask_embedding import FILE, read_mask_embedding, write_mask_embedding
from dflash_jax.decoding.generate import generate
from dflash_jax.errors import InputError
from dflash_jax.pair import load
from tests.checkpoints.folders import assert_same, drafter_folder
from tests.test_goldens import GOLDENS

DIM, MASK = 32, 5
VALUES = np.linspace(-2, 2, DIM).astype(np.float32)


def test_without_it_drafts_are_lost(tmp_path):
    """The recorded run has 2.47 tokens a round with it."""
    case = GOLDENS / "zlab_mask_embedding"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((case / "drafter" / name).read_bytes())
    prompt = load_file(case / "expected.safetensors")["prompt"].tolist()
    lengths = [
        generate(load(case / "target", drafter), [prompt], max_new_tokens=40)[0].acceptance_lengths
        for drafter in (case / "drafter", tmp_path)
    ]
    assert np.mean(lengths[0]) > 2 > 1.3 > np.mean(lengths[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read(tmp_path, dtype):
    write_mask_embedding(tmp_path / FILE, VALUES.astype(dtype), MASK)
    found = read_mask_embedding(tmp_path / FILE, MASK, DIM)
    np.testing.assert_array_equal(found.read(0, DIM).astype(np.float32), VALUES.astype(dtype).astype(np.float32))


def test_a_drafter_keeps_it_and_gives_it_back(tmp_path):
    drafter_folder(tmp_path, "dflash")
    mask = load_drafter(tmp_path)[0].mask_token_id
    assert load_drafter(tmp_path)[1].mask_embedding is None
    write_mask_embedding(tmp_path / FILE, VALUES, mask)
    _, drafter = load_drafter(tmp_path)
    np.testing.assert_array_equal(drafter.mask_embedding[...], VALUES)
    save_drafter(drafter, tmp_path / "again")
    assert_same(load_drafter(tmp_path / "again")[1], drafter)
    save_drafter(drafter, tmp_path / "short", jnp.bfloat16)
    short = load_drafter(tmp_path / "short", jnp.bfloat16)[1].mask_embedding[...]
    np.testing.assert_array_equal(short, VALUES.astype(ml_dtypes.bfloat16))
    (tmp_path / FILE).unlink()
    save_drafter(load_drafter(tmp_path)[1], tmp_path / "again")
    assert not (tmp_path / "again" / FILE).exists()


@pytest.mark.torch
def test_torch_reads_what_is_written_and_its_own_files_are_read(tmp_path):
    """A dict, a bare tensor, a parameter, a row of a table, and values with more axes."""
    torch = pytest.importorskip("torch")
    write_mask_embedding(tmp_path / FILE, VALUES, MASK)
    theirs = torch.load(tmp_path / FILE, weights_only=True)
    assert theirs["mask_token_id"] == MASK
    np.testing.assert_array_equal(theirs["embedding"].numpy(), VALUES)
    tensor = torch.from_numpy(VALUES)
    table = torch.stack([tensor + 1, tensor, tensor + 2])
    for saved in (
        {"embedding": tensor, "mask_token_id": MASK, "per_position": False},
        tensor,
        {"embedding": torch.nn.Parameter(tensor), "mask_token_id": MASK},
        {"embedding": table[1]},
        {"embedding": tensor.reshape(1, 1, DIM)},
    ):
        torch.save(saved, tmp_path / FILE)
        np.testing.assert_array_equal(read_mask_embedding(tmp_path / FILE, MASK, DIM).read(0, DIM), VALUES)
    for saved, message in (
        ({"embedding": torch.stack([tensor, tensor], 1)[:, 1]}, "do not lie side by side"),
        ({"embedding": table}, "has 96 values and the drafter's hidden size is 32"),
        ({"embedding": tensor, "per_position": True}, "an embedding for each position"),
        ({"embedding": tensor, "mask_token_id": 7}, "is for mask token 7, and config.json says 5"),
        ({"weight": tensor}, "has no tensor named embedding"),
        ({"embedding": tensor.double()}, "it asks for torch.DoubleStorage"),
        ({"embedding": tensor * float("nan")}, "not finite"),
    ):
        torch.save(saved, tmp_path / FILE)
        with pytest.raises(InputError, match=message):
            read_mask_embedding(tmp_path / FILE, MASK, DIM)


class Shell:
    def __reduce__(self):
        return os.system, ("touch it-ran",)


@pytest.mark.parametrize("contents", [Shell(), {"embedding": Shell()}, 7, [1, 2], {"embedding": "text"}])
def test_a_pickle_runs_nothing(tmp_path, monkeypatch, contents):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / FILE, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(contents))
    with pytest.raises(InputError, match=FILE):
        read_mask_embedding(tmp_path / FILE, MASK, DIM)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04", pickle.dumps({"embedding": 1})])
def test_what_is_no_archive_is_refused(tmp_path, contents):
    (tmp_path / FILE).write_bytes(contents)
    with pytest.raises(InputError, match=r"is not a tensor that torch\.save wrote"):
        read_mask_embedding(tmp_path / FILE, MASK, DIM)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    write_mask_embedding(tmp_path / FILE, VALUES, MASK)
    with zipfile.ZipFile(tmp_path / FILE) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / FILE, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text[:64] if name.endswith("data/0") else text)
    with pytest.raises(InputError, match="cut short"):
        read_mask_embedding(tmp_path / FILE, MASK, DIM)
