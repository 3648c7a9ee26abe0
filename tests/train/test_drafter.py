"""Training a drafter on documents: exact resume, a first stage to start from, taps from disk, figures."""

import dataclasses
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash_jax.cache import DrafterCache
from dflash_jax.checkpoints import save_drafter
from dflash_jax.checkpoints.mask_embedding import write_mask_embedding
from dflash_jax.errors import InputError
from dflash_jax.text import Tokenizer
from tests.train.small import CONFIG, MASK, SMALL, VOCAB, drafter, responses
from train import taps
from train.architecture import tap_ids
from train.data import DataConfig, Part
from train.drafter import Setting, started, train_drafter
from train.evaluate import DecodeConfig, held_out_prompts, round_figures
from train.optimizer import make_optimizer
from train.placing import new_state
from train.tracking import read_log

DATA = DataConfig(length=64, bins=2, threads=0)
QUICK = dataclasses.replace(CONFIG, decode=DecodeConfig(prompts=0))


def setting(target, out, **changes) -> Setting:
    tokenizer = Tokenizer(None, out, VOCAB)
    return Setting(target, tokenizer, MASK, responses(6), responses(2, seed=1), DATA, out, **changes)


def losses(folder) -> list[float]:
    return [line["loss"] for line in read_log(folder) if "loss" in line]


@pytest.mark.parametrize(
    ("layers", "count", "expected"), [(8, 3, (1, 3, 5)), (36, 5, (1, 9, 17, 25, 33)), (8, 1, (4,))]
)
def test_taps_are_spread_and_leave_the_last_layer_out(layers, count, expected):
    assert tap_ids(layers, count) == expected


def test_sliding_layers_come_first_and_are_causal(target):
    made = dataclasses.replace(SMALL, num_layers=3, sliding_window=6, sliding_layers=2)
    config = made.drafter_config(target.config, MASK)
    assert config.layer_types == ("sliding_attention",) * 2 + ("full_attention",)
    assert config.causal == (True, True, False) and config.sliding_window == 6
    every = dataclasses.replace(SMALL, sliding_window=6).drafter_config(target.config, MASK)
    assert set(every.layer_types) == {"sliding_attention"}
    forced = dataclasses.replace(made, causal=False).drafter_config(target.config, MASK)
    assert forced.causal == (False, False, False) and forced.layer_types == config.layer_types
    for wrong, message in ((dataclasses.replace(made, sliding_layers=4), "give 0 to 3"),
                           (dataclasses.replace(made, sliding_window=None), "give sliding_window too")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            wrong.drafter_config(target.config, MASK)


def test_training_resumes_exactly(target, tmp_path):
    whole, done = train_drafter(QUICK, setting(target, tmp_path))
    assert done
    first = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")  # as if killed after step 4
    resumed, _ = train_drafter(QUICK, setting(target, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(model) for model in (whole, resumed)))
    assert losses(tmp_path) == first and len(first) == 3


def test_taps_from_disk_give_the_losses_of_taps_made_in_the_step(target, tmp_path):
    """The held-out figures too. The cache is made once: a second run only reads it."""
    cached = dataclasses.replace(DATA, taps="cache")
    for name, data in (("online", DATA), ("cache", cached)):
        train_drafter(QUICK, dataclasses.replace(setting(target, tmp_path / name), data=data))
    lines = [read_log(tmp_path / name) for name in ("online", "cache")]
    for online, cache in zip(*lines, strict=True):
        for key in online.keys() - {"tokens_per_second"}:
            np.testing.assert_allclose(cache[key], online[key], rtol=2e-5, atol=1e-6, err_msg=key)
    files = sorted((tmp_path / "cache" / "taps").rglob("*.npy"))
    before = [path.stat().st_mtime_ns for path in files]
    shutil.rmtree(tmp_path / "cache" / "checkpoints")
    train_drafter(QUICK, dataclasses.replace(setting(target, tmp_path / "cache"), data=cached))
    assert files and [path.stat().st_mtime_ns for path in files] == before
    other = dataclasses.replace(setting(target, tmp_path / "cache"), data=cached, learned=responses(6, seed=9))
    with pytest.raises(InputError, match="holds taps made with another documents"):
        train_drafter(QUICK, other)


def test_a_run_stopped_while_it_makes_taps_does_not_begin_those_of_the_held_out_documents(target, tmp_path):
    cached = dataclasses.replace(setting(target, tmp_path), data=dataclasses.replace(DATA, taps="cache"))
    usual = signal.getsignal(signal.SIGTERM)

    def stop_once_taps_are_made(*arguments):
        if signal.getsignal(signal.SIGTERM) is not usual:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    real = taps._taps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taps, "_taps", stop_once_taps_are_made)
        _, done = train_drafter(QUICK, cached)
    assert not done
    assert [path.name for path in (tmp_path / "taps").iterdir()] == ["learned"]
    assert train_drafter(QUICK, cached)[1]


def test_a_dflash_drafter_starts_a_dflash2_one_that_predicts_the_same(target, tmp_path):
    """Its convolutions and its selector begin as the identity."""
    save_drafter(drafter(target), tmp_path / "first", jnp.float32)
    two = dataclasses.replace(SMALL, convolution=True, selector_rank=4).drafter_config(target.config, MASK)
    optimizer = make_optimizer(QUICK.optimizer, 10)

    def blank(config):
        return new_state(lambda: nnx.state(type(drafter(target))(config, rngs=nnx.Rngs(5))), optimizer, None)

    state = started(blank(two), tmp_path / "first")
    given, made = dict(nnx.to_flat_state(nnx.state(drafter(target)))), dict(nnx.to_flat_state(state.params))
    assert given.keys() < made.keys()
    for path, x in given.items():
        np.testing.assert_array_equal(x.get_value(), made[path].get_value())
    still = dataclasses.replace(QUICK.optimizer, learning_rate=0.0)
    config = dataclasses.replace(QUICK, architecture=dataclasses.replace(SMALL, convolution=True), optimizer=still)
    trained, _ = train_drafter(config, setting(target, tmp_path / "run", start=tmp_path / "first"))
    cache = DrafterCache.empty(trained.config, 1, 32, jnp.float32)
    rows, lengths = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 16)), jnp.float32), jnp.zeros(1, int)
    np.testing.assert_allclose(trained(rows, cache, lengths), drafter(target)(rows, cache, lengths), rtol=1e-5)
    wide = dataclasses.replace(SMALL, intermediate_size=24).drafter_config(target.config, MASK)
    with pytest.raises(InputError, match="for which the drafter to train has no place; give its sizes"):
        started(blank(wide), tmp_path / "first")


def test_held_out_prompts_end_where_the_response_begins():
    data = responses(5)
    assert held_out_prompts(Part(data, [3, 1]), 1) == [data.tokens[3, : data.prompts[3]].tolist()]
    assert len(held_out_prompts(data, 9)) == 5


def test_figures_of_rounds_against_a_count():
    @dataclasses.dataclass
    class Made:
        acceptance_lengths: list[int]

    figures = round_figures([Made([1, 4, 2]), Made([3])], rows=4)
    assert figures == {"acceptance_length": 2.5, "accepted": [0.75, 0.5, 0.25]}
    assert round_figures([Made([])], rows=4) == {}


def test_a_mask_embedding_of_the_drafter_to_start_from_goes_on_being_trained(target, tmp_path):
    save_drafter(drafter(target), tmp_path / "first", jnp.float32)
    values = np.linspace(-1, 1, 16).astype(np.float32)
    write_mask_embedding(tmp_path / "first" / "mask_embedding.pt", values, MASK)
    trained, _ = train_drafter(QUICK, setting(target, tmp_path / "run", start=tmp_path / "first"))
    moved = np.abs(np.asarray(trained.mask_embedding[...]) - values)
    assert 0 < moved.max() < 0.5
