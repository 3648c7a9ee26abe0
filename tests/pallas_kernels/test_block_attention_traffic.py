"""What the TPU kernel says that it moves, against its copies and block transfers counted one by one; and lowering."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_attention import plan as planning
from pallas_kernels.block_attention.cases import cases
from tests.pallas_kernels.blocks import Block

pytestmark = pytest.mark.timeout(240)


class Counted:
    """A copy that reports its bytes when it is started, at run time."""

    def __init__(self, copy: Any, size: int, log: list[int]):
        self.copy, self.size, self.log, self.wait = copy, size, log, copy.wait

    def start(self) -> None:
        jax.debug.callback(lambda: self.log.append(self.size))
        self.copy.start()


def kernel_of(block: Block) -> Any:
    """The equation of the `pallas_call` in a block's program."""
    arrays, options = block.arguments()
    program = jax.make_jaxpr(lambda *a: block_attention(*a, implementation="tpu", **options))(*arrays)
    found = []

    def look(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append(equation)
                continue
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    look(getattr(inner, "jaxpr", inner))

    look(program.jaxpr)
    return found[0]


def block_transfers(mapping: Any, scalars: list[np.ndarray]) -> int:
    """Bytes of the blocks in VMEM: one is moved whenever its indices change from one grid step to the next."""
    total, (cores, steps) = 0, mapping.grid
    for block in mapping.block_mappings:
        if "any" in str(block.transformed_block_aval).lower():
            continue  # copied by hand
        shape = [getattr(n, "block_size", n) for n in block.block_shape]
        size = int(np.prod([n for n in shape if isinstance(n, int)])) * block.array_aval.dtype.itemsize
        index = block.index_map_jaxpr
        for core in range(cores):
            before = None
            for step in range(steps):
                at = tuple(int(i) for i in jax.core.eval_jaxpr(index.jaxpr, index.consts, core, step, *scalars))
                total += size * (at != before)
                before = at
    return total


@pytest.mark.parametrize(
    "change", [{}, {"window": 40}, {"tree": True, "sinks": True}, {"write": False}, {"split": True}]
)
def test_the_kernel_moves_what_it_says(monkeypatch, change: dict[str, Any]):
    change = dict(change)
    split = change.pop("split", False)
    monkeypatch.setattr(planning, "_context", lambda plan: 1 << 60 if split else 0)
    block = Block((64 * 3 - 5, 70, 0), 5, page=64, pages=3, **change)
    log: list[int] = []
    honest = pltpu.make_async_copy

    def counted(source: Any, into: Any, semaphore: Any) -> Counted:
        return Counted(honest(source, into, semaphore), int(np.prod(source.shape)) * source.dtype.itemsize, log)

    monkeypatch.setattr(pltpu, "make_async_copy", counted)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        jax.block_until_ready(block.run(implementation="tpu"))
    jax.effects_barrier()
    kernel = kernel_of(block)
    arrays, options = block.arguments()
    asked = {name: options[name] for name in ("causal", "scale", "window", "soft_cap", "write")}
    plan = planning.make_plan(
        arrays[0], arrays[1], options["page_table"], masks=3 * block.tree, sinks=block.sinks, **asked
    )  # fmt: skip
    scalars = [np.zeros(len(block.lengths), np.int32), np.zeros(1, np.int32)]
    moved = sum(log) + block_transfers(kernel.params["grid_mapping"], scalars)
    if split:  # the merge reads the parts and writes the output
        queries = 3 * plan.kv_heads * plan.rows
        moved += 2 * queries * (plan.head_dim + 128) * 4 + queries * plan.head_dim * 4
    assert plan.bytes_moved(list(block.lengths)) == moved
    assert kernel.params["cost_estimate"].bytes_accessed == plan.bytes_moved([block.page * block.pages - 5] * 3)


def test_the_sizes_of_real_models_move_hardly_more_than_they_must():
    table = list(cases())
    assert {case.name.split(",")[0].split(" heads")[0].split(" full")[0] for case in table} >= {
        "Qwen3.5-397B-A17B", "Qwen3.5-35B-A3B", "Qwen3-Coder-30B-A3B", "gpt-oss-120b",
    }  # fmt: skip
    for case in table:
        assert case.moved <= 1.15 * case.must_move, case.name


@pytest.mark.parametrize("change", [{}, {"paged": False}, {"tree": True, "window": 9, "sinks": True}, {"write": False}])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_other_platforms(platform: str, change: dict[str, Any]):
    block = Block((50, 3), 16, head_dim=64, packed=2, dtype="bfloat16", **change)
    arrays, options = block.arguments()
    program = jax.jit(lambda *a: block_attention(*a, **options))
    text = jax.export.export(program, platforms=[platform])(*arrays).mlir_module()
    assert ("tpu_custom_call" in text) == (platform == "tpu")


def test_an_implementation_that_does_not_take_the_call_says_so():
    block = Block((5,), 3, head_dim=64)
    with pytest.raises(ValueError, match="tpu implementation does not take"):
        block.run(implementation="tpu")
