"""What kernels for Hopper GPUs (Mosaic GPU) share: shared memory that TMA and WGMMA agree on, and sums of products."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array
# jax 0.10 wants an index beside the reference, and newer ones none.
_index = inspect.signature(plgpu.load).parameters.get("idx")
_WHOLE: Any = () if _index is None or _index.default is not inspect.Parameter.empty else ((),)


def load(ref: Any, layout: Any) -> Array:
    """All that a reference to global or shared memory shows, laid over the threads of a warpgroup."""
    return plgpu.load(ref, *_WHOLE, layout=layout, optimized=False)


def swizzled(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory in the order that TMA writes and WGMMA reads without conflicts: 8 rows of 128 bytes a block."""
    transforms = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def accumulated(products: Callable[[Any], Array], shape: tuple[int, int]) -> Array:
    """What is summed up in an accumulator that starts from zero, in fp32."""
    return pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))


def add_product(acc: Any, x: Any, y: Any, turned: bool = False) -> None:
    """Start to add the product of two buffers, `turned`: of x and y transposed; the one before is done after this."""
    plgpu.wgmma(acc, x, y.transpose((1, 0)) if turned else y)
    plgpu.wgmma_wait(1)


def product(x: Any, y: Any) -> Array:
    """Of a buffer [rows, n] and a buffer [columns, n] transposed, in fp32."""

    def made(acc: Any) -> Array:
        add_product(acc, x, y, turned=True)
        return acc[...]

    return accumulated(made, (x.shape[0], y.shape[0]))


def plus_product(acc: Array, x: Array, y: Any) -> Any:
    """What is in registers, in fp32, and the product of x in registers and a buffer."""
    return pl.run_state(lambda ref: plgpu.wgmma(ref, x, y))(plgpu.ACC.init(acc))
