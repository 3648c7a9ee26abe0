"""`make aot`: what it fails on, and what it writes. Compiling itself needs the aot extra."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot import TOPOLOGIES, Result, bound, compile_case, document, failures, kernels, share
from dflash_jax.topology import CHIPS, has_compiler, parse_topology
from pallas_kernels.case import Case


def result(**changed):
    given = {"folder": "copying", "case": "batch 1", "topology": "v5e:2x2", "kernel": True}
    return Result(**({**given, "must_move": 819_000_000, "moved": 819_000_000, "flops": 10**9} | changed))


def test_every_kernel_with_cases_is_found():
    assert {"block_attention", "gated_delta", "head_sampling", "anchored_attention"} <= set(kernels())


def test_a_sample_compiles_each_case_for_one_chip():
    shares = [share(list(range(102)), name) for name in TOPOLOGIES]
    assert sorted(case for one in shares for case in one) == list(range(102))
    assert {len(one) for one in shares} == {17}


def test_what_moves_too_much_or_does_not_compile_fails():
    good, greedy = result(moved=int(1.1 * 819e6)), result(case="batch 32", moved=int(1.2 * 819e6))
    broken = result(case="batch 64", failure="RESOURCE_EXHAUSTED: VMEM")
    found = failures([good, greedy, broken])
    assert len(found) == 2
    assert any("batch 32" in line and "1.20" in line for line in found)
    assert any("batch 64" in line and "VMEM" in line for line in found)


def test_the_bound_is_the_longer_of_bytes_and_products():
    chip = parse_topology("v5e:2x2")
    assert bound(result(), chip) == pytest.approx(1000)
    assert bound(result(flops=394 * 10**9), chip) == pytest.approx(2000)


def test_the_document_says_where_the_reference_runs():
    lines = list(
        document([result(), result(topology="h100:8", kernel=False), result(topology="v6e:2x2", failure="no")])
    )
    row = next(line for line in lines if line.startswith("| batch 1 "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0:3] == ["batch 1", "781.1 MiB", "1.00x"]
    assert cells[4] == "1000.0"
    assert cells[6] == "-"
    assert cells[8].endswith(" ref")


@pytest.mark.skipif(not has_compiler(CHIPS["v5e"]), reason="needs the aot extra")
def test_an_overflow_of_vmem_is_a_failure_and_a_kernel_is_told_from_the_reference():
    from jax.experimental import pallas as pl

    def double(x, implementation):
        if x.shape[0] < 8:
            return x * 2  # as a dispatcher that has no kernel for it

        def kernel(x, out):
            out[...] = x[...] * 2

        return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    def compiled(rows):
        shape = (jax.ShapeDtypeStruct((rows, 1024), jnp.float32),)
        case = Case("case", double, shape, 1, 1, 1)
        topology = parse_topology("v5e:2x2")
        return compile_case("double", case, topology, topology.devices()[0])

    assert compiled(8).kernel
    assert not compiled(4).kernel
    assert not compiled(8).failure
    assert "vmem" in compiled(2**16).failure.lower()
