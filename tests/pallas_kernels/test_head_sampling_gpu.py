"""The GPU kernel on a GPU or in Mosaic GPU's interpreter, and its lowering at the sizes of real models."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.head_sampling import Projection, gpu, head_sampling, reference
from tests.pallas_kernels.device import ON_GPU, by_the_interpreter, running_kernels
from tests.pallas_kernels.head_cases import draw
from tests.pallas_kernels.test_head_sampling import equal

pytestmark = pytest.mark.timeout(240)
SHARED_MEMORY = 232_448  # bytes that the programs of one multiprocessor of an H100 have together


def padded(s, hidden, weight, temperature, *, call=gpu._call):
    """TMA reads noughts behind an array, and the interpreter refuses to; tokens that do not exist are large here."""
    model, vocab = -s.model % gpu.CHUNK, -s.size % gpu.TILE
    hidden = jnp.pad(hidden, ((0, 0), (0, model)))
    columns = s.projection.layout == "dv"
    for pad, value, axis in ((model, 0, 0), (vocab, 9, 1)):
        pads = (0, pad), (0, 0)
        weight = jnp.pad(weight, pads if (axis == 0) == columns else pads[::-1], constant_values=value)
    return call(s, hidden, weight, temperature)


@pytest.fixture
def interpreted(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(gpu, "_call", padded)
    with running_kernels(monkeypatch):
        yield


def some(seed, rows, vocab, **options):
    return draw(seed, rows, vocab, given=0, dtype=jnp.bfloat16, **options)


CASES = [
    some(0, 3, 640, kind="top", model=128),
    some(1, 70, 520, kind="total", model=192, layout="vd", start=512),
    some(2, 64, 960, kind="total", model=64),
]


def agrees(case):
    hidden, weight, *_ = case.positional
    assert gpu.takes(hidden, weight, None, None, 1, case.static["vocab"])
    found, expected = (sample(*case.positional, **case.static) for sample in (gpu.sample, reference.sample))
    projection = case.static["projection"]
    if projection.soft_cap:  # two compilations of tanh differ in the last digit: so may the order and number of the top
        logits = np.asarray(reference.logits(projection, hidden, weight))
        chosen = np.take_along_axis(logits, np.asarray(found.ids - case.arrays["start"]), axis=1)
        np.testing.assert_allclose(chosen, expected.values, rtol=1e-6)
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)
        cold = np.asarray(case.arrays["temperature"]) < 1e-3
        assert np.all(found.total[cold] >= 1)
        total = np.where(cold, expected.total, found.total)
        found = replace(found, ids=expected.ids, values=expected.values, total=total)
    equal(found, expected)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("programs", [2, 264])
def test_equals_the_reference(interpreted, monkeypatch, case, programs):
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    agrees(case)


def test_ties_across_tiles_and_shares_go_to_the_lowest_id(interpreted, monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAMS", 2)
    case = some(0, 8, 640, kind="top", model=64)
    case.arrays["hidden"] = jnp.ones_like(case.arrays["hidden"])
    case.arrays["weight"] = jnp.zeros_like(case.arrays["weight"]).at[0, jnp.asarray([130, 255, 256, 639])].set(1)
    np.testing.assert_array_equal(gpu.sample(*case.positional, **case.static).ids, 130)


def _no_wait(patch):
    patch.setattr(plgpu, "barrier_wait", lambda barrier: None)


def _later_tile_wins_ties(patch):
    right = gpu._look

    def wrong(s, logits, tile, warmth, carry):
        below = jnp.where(carry[0] == logits.max(axis=1), carry[0] - 1, carry[0])
        return right(s, logits, tile, warmth, (below, *carry[1:]))

    patch.setattr(gpu, "_look", wrong)


def _one_column_too_many(patch):
    right = gpu._look
    wider = lambda s: gpu.Shape(s.blocks, s.shares, s.model, s.size + 8, s.projection)  # noqa: E731
    patch.setattr(gpu, "_look", lambda s, *rest: right(wider(s), *rest))


@by_the_interpreter
@pytest.mark.parametrize("breaks", [_no_wait, _later_tile_wins_ties, _one_column_too_many])
def test_a_broken_kernel_is_detected(interpreted, monkeypatch, breaks):
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    breaks(monkeypatch)
    case = some(0, 64, 576, kind="total", model=128)
    case.arrays["weight"] = case.arrays["weight"].at[:, 571:].set(-1)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        agrees(case)


@pytest.mark.parametrize(
    ("layout", "rows", "vocab", "model"),
    [
        ("dv", 16, 151_936, 2048),
        ("dv", 512, 248_320, 4096),
        ("dv", 1, 201_088, 2880),
        ("vd", 256, 25_136, 2880),
        ("dv", 16, 31_040, 4096),
    ],
)
def test_lowers_at_real_sizes(layout, rows, vocab, model):
    shapes = (rows, model), (model, vocab) if layout == "dv" else (vocab, model)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    call = partial(head_sampling, projection=Projection(layout, 0.5, 30.0))
    exported = jax.export.export(jax.jit(call), platforms=["cuda"])(*arrays)
    assert "mosaic_gpu" in exported.mlir_module()
    assert f"{rows}x{vocab}xf32" not in exported.mlir_module()


def test_two_programs_fit_a_multiprocessor():
    ring = gpu.BUFFERS * (gpu.ROWS + gpu.TILE) * gpu.CHUNK * 2
    assert 2 * (ring + 3 * gpu.ROWS * 4 + 1024) <= SHARED_MEMORY


@pytest.mark.parametrize("kind", ["draw", "slots", "given", "fp32", "crooked"])
def test_what_it_does_not_take_runs_the_reference(kind):
    case = draw(
        0,
        4,
        250 if kind == "crooked" else 256,
        given=2 * (kind == "given"),
        kind="draw" if kind == "draw" else "top",
        model=64,
    )
    if kind != "fp32":
        case.arrays.update({name: case.arrays[name].astype(jnp.bfloat16) for name in ("hidden", "weight")})
    static = {"projection": case.static["projection"], "slots": 4 if kind == "slots" else 1}
    exported = jax.export.export(jax.jit(partial(head_sampling, **static)), platforms=["cuda"])(*case.positional)
    assert "mosaic_gpu" not in exported.mlir_module()
    with pytest.raises(ValueError, match="gpu implementation does not take"):
        head_sampling(*case.positional, **static, implementation="gpu")
