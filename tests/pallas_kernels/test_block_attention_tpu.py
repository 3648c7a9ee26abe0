"""The TPU kernel in the TPU interpreter: copies happen when they are waited for, and fresh memory is NaN."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention import plan as planning
from pallas_kernels.block_attention import tpu, tpu_kernel
from pallas_kernels.dispatch import tuning
from tests.pallas_kernels.blocks import Block

pytestmark = pytest.mark.timeout(240)


def interpreted(block: Block, **more: Any) -> tuple[jax.Array, ...]:
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**more)):
        return jax.block_until_ready(block.run(implementation="tpu"))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a short context has several, and the contexts are split as long ones are."""
    sizes = {"default": {**tuning(planning.__file__)["default"], "tile": 32, "piece": 16}}
    monkeypatch.setattr(planning, "tuning", lambda _: sizes)
    monkeypatch.setattr(planning, "_context", lambda plan: 1 << 60)


@st.composite
def blocks(draw: Callable[[Any], Any]) -> Block:
    page, pages = draw(st.sampled_from([(16, 7), (32, 4), (48, 2), (64, 2)]))
    width = draw(st.sampled_from([1, 2, 5, 16, 21, 40]))
    kv_heads, packed = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2)]))
    length = st.one_of(st.integers(0, page * pages - width), st.sampled_from([0, page - 1, page, page * pages - width]))
    tree = draw(st.booleans())
    return Block(
        lengths=tuple(draw(st.lists(length, min_size=1, max_size=3))), width=width, page=page, pages=pages,
        kv_heads=kv_heads, heads=kv_heads * draw(st.sampled_from([1, 3, 4])), packed=packed,
        head_dim=128 // packed if kv_heads > 1 else draw(st.sampled_from([128, 256])),
        paged=draw(st.booleans()), dtype=draw(st.sampled_from(["float32", "float32", "bfloat16"])), tree=tree,
        causal=tree or draw(st.booleans()), window=draw(st.sampled_from([None, None, 1, 2, 17, 40])),
        soft_cap=draw(st.sampled_from([None, 4.0])), sinks=draw(st.booleans()), write=draw(st.booleans()),
        shared_mask=draw(st.booleans()), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=10, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(blocks())
def test_equals_the_reference(small_tiles: None, block: Block):
    expected = np.asarray(block.run(0.0, implementation="reference")[0], np.float64)
    block.check(interpreted(block), expected)


@pytest.mark.parametrize("splits", [1, 2])
def test_several_tiles_and_units_on_two_cores_without_races(small_tiles: None, monkeypatch, splits: int):
    monkeypatch.setattr(planning, "_context", lambda plan: 1 << 60 if splits == 2 else 0)
    block = Block((77, 0, 100, 1), 5, page=16, pages=7, window=70)
    # Copies take turns with the clocks, and two on one clock are never seen to race: give them enough.
    block.check(interpreted(block, detect_races=True, num_cores_or_threads=2, vector_clock_size=64))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_a_long_causal_block_runs_in_parts(monkeypatch):
    monkeypatch.setattr(tpu, "longest_block", lambda group, head_dim: 8)
    block = Block((3, 20), 21, page=16, pages=3)
    block.check(interpreted(block))


CHECKED = Block((33, 15, 50), 7, page=16, pages=4)


def test_the_checked_block_passes(small_tiles: None):
    CHECKED.check(interpreted(CHECKED))


def no_wait(plan: Any, r: Any, unit: Any, tile: Any, slot: Any, act: Any, honest: Any = tpu_kernel.transfer) -> None:
    if act == "start":
        honest(plan, r, unit, tile, slot, act)


def wrong_page(plan: Any, table: Any, sequence: Any, row: Any, honest: Any = tpu_kernel.page_of) -> Any:
    """The first row of a page is looked for in the page before."""
    _, inside = honest(plan, table, sequence, row)
    return honest(plan, table, sequence, jax.numpy.where((inside == 0) & (row > 0), row - 1, row))[0], inside


def wide_window(*args: Any, honest: Any = planning.make_plan, **options: Any) -> Any:
    return replace(honest(*args, **options), window=10)


def leaky_mask(plan: Any, r: Any, honest: Any = tpu_kernel.own_view) -> Any:
    seen, depth = honest(plan, r)
    column = jax.lax.broadcasted_iota(jax.numpy.int32, seen.shape, 1)
    return seen | ((column == 4) & (tpu_kernel.row_places(plan)[0] == 3)), depth


def hidden_row(plan: Any, r: Any, unit: Any, tile: Any, slot: Any, honest: Any = tpu_kernel.attend_tile) -> None:
    honest(plan, r, unit._replace(length=unit.length - 1), tile, slot)


@pytest.mark.parametrize(
    "name, fault, change",
    [
        ("transfer", no_wait, {}),
        ("page_of", wrong_page, {}),
        ("make_plan", wide_window, {"window": 9}),
        ("own_view", leaky_mask, {}),
        ("own_view", leaky_mask, {"tree": True}),
        ("attend_tile", hidden_row, {}),
    ],
)
def test_planted_faults_are_noticed(small_tiles: None, monkeypatch, name: str, fault: Any, change: dict[str, Any]):
    monkeypatch.setattr(tpu if name == "make_plan" else tpu_kernel, name, fault)
    block = replace(CHECKED, **change, made={})
    with pytest.raises(AssertionError):
        block.check(interpreted(block))
    pltpu.reset_tpu_interpret_mode_state()
