"""Pieces that every model here is made of: norms, rotary positions, the dense MLP."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.config import RopeConfig
from dflash_jax.sharding import Axes, per_shard, position, shards, total


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in fp32.

    `kind` says how the weight enters: "plain" casts to the input's dtype and then multiplies, "fp32_scale" multiplies
    first, "zero_centred" multiplies by 1 + weight in fp32.
    """

    def __init__(self, dim: int, eps: float, kind: str = "plain", *, dtype: jnp.dtype = jnp.float32):
        self.eps, self.kind = eps, kind
        self.weight = nnx.Param(jnp.zeros(dim, dtype) if kind == "zero_centred" else jnp.ones(dim, dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        weight = self.weight[...]
        if self.kind == "plain":
            return normed.astype(x.dtype) * weight.astype(x.dtype)
        scale = weight.astype(jnp.float32) + (1.0 if self.kind == "zero_centred" else 0.0)
        return (normed * scale).astype(x.dtype)


def linear(
    inputs: int, outputs: int | tuple[int, ...], axes: Axes, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.LinearGeneral:
    """A projection with its kernel stored [in, out...], the quickest layout for few rows on the CPU (measured).

    `axes` are the kernel's logical axes (see `dflash_jax.sharding`).
    """
    init = nnx.initializers.normal(0.02)
    promote: Any = _keep_dtype  # its protocol asks for more than it uses
    outer = tuple(None if axis == "embed" else axis for axis in axes[1:])
    return nnx.LinearGeneral(
        inputs, outputs, use_bias=bias, param_dtype=dtype, kernel_init=init, rngs=rngs, promote_dtype=promote,
        dot_general=_product, kernel_metadata={"axes": axes}, bias_metadata={"axes": outer},
    )  # fmt: skip


def _product(x: Array, kernel: Array, dimensions: Any, **_: Any) -> Array:
    """`product` for flax; on GPUs one row, which is plain decoding, takes a row of zeros along.

    Of one row and a matrix XLA makes element-wise products there, writes them out, and adds them up: a step of
    Qwen3-8B took 17% longer.
    """

    def beside_zeros(x: Array, kernel: Array) -> Array:
        return product(jnp.pad(x, [(0, 1), *[(0, 0)] * (x.ndim - 1)]), kernel)[:1]

    if math.prod(x.shape[:-1]) > 1:
        return product(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cuda=beside_zeros, default=product)


@jax.custom_vjp
def product(x: Float[Array, "... D"], kernel: Float[Array, "D ..."]) -> Float[Array, "..."]:
    """Rows times a matrix.

    The matrix's gradient is one product of two matrices, which XLA for the CPU takes as they lie. jax would contract
    all the axes of the rows; then XLA turns their gradients round, and so makes them a second time in an order in which
    no two numbers are neighbours.
    """
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    columns = tuple(range(x.ndim - 1, gradient.ndim))
    of_x = jax.lax.dot_general(gradient, kernel, ((columns, tuple(range(1, kernel.ndim))), ((), ())))
    rows, of_rows = x.reshape(-1, len(kernel)), gradient.reshape(-1, *kernel.shape[1:])
    return of_x, jax.lax.dot_general(rows, of_rows, (((0,), (0,)), ((), ())))


product.defvjp(_product_forward, _product_backward)


def side_by_side(x: Float[Array, "... N H"]) -> Float[Array, "... NH"]:
    """Heads (or experts) in one row.

    The CPU puts them there one after the other: of a reshape XLA makes one loop with all that is computed before it, in
    which no two numbers are neighbours (0.27 ms and not 0.07 for the gated norm of 128 rows and 4 heads of 64).
    """

    def joined(x: Array) -> Array:
        return jnp.concatenate([x[..., i, :] for i in range(x.shape[-2])], -1)

    def reshaped(x: Array) -> Array:
        return x.reshape(*x.shape[:-2], -1)

    if shards("heads") > 1:  # they lie on several devices
        return reshaped(x)
    return jax.lax.platform_dependent(x, cpu=joined, default=reshaped)


def lookup(table: Float[Array, "V D"], ids: Int[Array, "B W"]) -> Float[Array, "B W D"]:
    """Rows of an embedding whose vocabulary may be spread over devices: each adds those that it has."""

    def local(table: Array, ids: Array) -> Array:
        at = ids - position("vocab") * len(table)
        mine = (at >= 0) & (at < len(table))
        return total(jnp.where(mine[..., None], table[jnp.where(mine, at, 0)], 0), "vocab")

    if shards("vocab") == 1:
        return table[ids]
    return per_shard(local, [("vocab", None), ("batch", None)], ("batch", None, None))(table, ids)


def _keep_dtype(arrays: tuple, /, *, dtype: jnp.dtype | None = None, **_: object) -> tuple:
    """Compute in the dtype of the activations, whatever the weights are stored in."""
    x, *rest = arrays
    return (x, *(None if a is None else a.astype(x.dtype) for a in rest))


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up, elementwise."""
    return jax.nn.silu(gate) * up


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate) * up)."""

    def __init__(self, dim: int, columns: int, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate_up = linear(dim, (2, columns), ("embed", None, "mlp"), bias=bias, dtype=dtype, rngs=rngs)
        self.down = linear(columns, dim, ("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        h = self.gate_up(x)
        return self.down(swiglu(h[..., 0, :], h[..., 1, :]))


def inverse_frequencies(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Angular frequencies of the rotated pairs [dim / 2], and the factor on cos and sin (yarn's attention factor).

    Source: the formulas of "llama3" (Llama 3.1) and "yarn" (arXiv 2309.00071) as transformers states them.
    """
    frequencies = rope.theta ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(frequencies, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(frequencies, rope), _yarn_factor(rope)
    return frequencies, 1.0


def _llama3(frequencies: np.ndarray, rope: RopeConfig) -> np.ndarray:
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn(frequencies: np.ndarray, rope: RopeConfig) -> np.ndarray:
    def pair_with(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _yarn_factor(rope: RopeConfig) -> float:
    def amplitude(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return amplitude(rope.mscale) / amplitude(rope.mscale_all_dim)
    return amplitude(1.0)


Rotation = tuple[Float[Array, "B T R"], Float[Array, "B T R"]]


def rotation(positions: Int[Array, "B T"], rope: RopeConfig, dtype: jnp.dtype) -> Rotation:
    """cos and sin for absolute positions, made in fp32 and cast, halves repeated.

    They are repeated, and not the angles: XLA for the CPU would make both anew for every head of every layer.
    """
    frequencies, factor = inverse_frequencies(rope)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    cos, sin = ((turn(angles) * factor).astype(dtype) for turn in (jnp.cos, jnp.sin))
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([sin, sin], -1)


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotary embedding of the first R of H dims, half-split pairs; the rest passes through."""
    cos, sin = (a[:, :, None] for a in rotation)
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    first, second = jnp.split(turned, 2, -1)
    out = turned * cos + jnp.concatenate([-second, first], -1) * sin
    return jnp.concatenate([out, rest], -1) if rest.shape[-1] else out
