"""Whether a GPU is here: then tests run the kernels themselves on it, and Mosaic GPU's interpreter where there is none.

`JAX_PLATFORMS=cuda XLA_FLAGS= python -m pytest tests/pallas_kernels -k gpu`

The interpreter knows neither register layouts nor WGMMA: the former are left out, and plain products stand in for the
latter. So it checks addresses, copies, barriers, masks and what is done in registers, not WGMMA.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import params  # has no public name yet
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper

ON_GPU = jax.default_backend() == "gpu"
INTERPRET = None if ON_GPU else params.InterpretGPUParams()
by_the_interpreter = pytest.mark.skipif(ON_GPU, reason="breaks a kernel in a way that only the interpreter survives")


@contextmanager
def running_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that take no `interpret` run, too, where there is no GPU."""
    if INTERPRET is None:
        yield
        return
    monkeypatch.setattr(hopper, "add_product", add_product)
    monkeypatch.setattr(hopper, "accumulated", accumulated)
    monkeypatch.setattr(hopper, "product", lambda x, y: product(x, y, turned=True))
    monkeypatch.setattr(hopper, "plus_product", plus_product)
    monkeypatch.setattr(hopper, "load", lambda ref, layout: ref[...])
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(
        plgpu, "broadcasted_iota", lambda dtype, shape, axis, layout: jax.lax.broadcasted_iota(dtype, shape, axis)
    )
    with params.force_gpu_interpret_mode(INTERPRET):
        yield


def product(x: Any, y: Any, turned: bool) -> jax.Array:
    dims = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(x[...], y[...], dims, preferred_element_type=jnp.float32)


def add_product(acc: Any, x: Any, y: Any, turned: bool = False) -> None:
    acc[...] += product(x, y, turned)


def accumulated(products: Callable[[Any], jax.Array], shape: tuple[int, int]) -> jax.Array:
    def from_zero(acc: Any) -> jax.Array:
        acc[...] = jnp.zeros_like(acc)
        return products(acc)

    return pl.run_scoped(from_zero, plgpu.SMEM(shape, jnp.float32))


def plus_product(acc: jax.Array, x: jax.Array, y: Any) -> jax.Array:
    return acc + jnp.dot(x, y[...], preferred_element_type=jnp.float32)
