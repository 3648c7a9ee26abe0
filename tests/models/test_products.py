"""How accelerators are made to multiply: seen in what is lowered for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dflash_jax
from dflash_jax.hlo import Program
from dflash_jax.models.layers import linear, product


def lowered(x: jax.Array, platform: str) -> str:
    layer = linear(8, 4, ("embed", "mlp"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    return jax.export.export(jax.jit(layer), platforms=[platform])(x).mlir_module()


@pytest.mark.parametrize(("platform", "rows"), [("cuda", 2), ("cpu", 1), ("tpu", 1)])
def test_one_row_takes_zeros_along_on_a_gpu(platform: str, rows: int):
    assert f"(tensor<{rows}x1x8xbf16>, tensor<8x4xbf16>)" in lowered(jnp.ones((1, 1, 8), jnp.bfloat16), platform)


def test_several_rows_are_left_alone():
    assert "(tensor<1x2x8xbf16>, tensor<8x4xbf16>)" in lowered(jnp.ones((1, 2, 8), jnp.bfloat16), "cuda")


def test_beside_zeros_a_row_is_what_it_is_alone(monkeypatch: pytest.MonkeyPatch):
    layer, x = linear(8, 4, ("embed", "mlp"), dtype=jnp.float32, rngs=nnx.Rngs(0)), jnp.arange(8.0).reshape(1, 1, 8)
    wanted = layer(x)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *given, cuda, default: cuda(*given))
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("backend", "dtype", "exact"), [("gpu", "float32", True), ("gpu", "bfloat16", False), ("cpu", "float32", False)]
)
def test_fp32_weights_are_multiplied_in_fp32_on_accelerators(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: str, exact: bool
):
    pair = dflash_jax.load(dtype=jnp.dtype(dtype))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with pair.on_mesh():
        text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).as_text()
    assert ("HIGHEST" in text) == exact


@pytest.mark.parametrize("columns", [(5,), (2, 3)])
def test_gradients_of_a_product_are_those_of_its_definition(columns: tuple[int, ...]):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 3, 4), (4, *columns)))
    weights = jnp.asarray(rng.normal(size=(2, 3, *columns)), jnp.float32)
    found, wanted = (
        jax.grad(lambda x, kernel, of=of: jnp.sum(jnp.sin(of(x, kernel)) * weights), (0, 1))(x, kernel)
        for of in (product, lambda x, kernel: jnp.tensordot(x, kernel, 1))
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_rows_are_not_turned_round_for_a_gradient():
    """On the CPU: neither they nor their gradients are written column by column."""
    rows, dim, hidden = (4, 8, 16), 32, 64
    kernels = jnp.ones((dim, 2, hidden)), jnp.ones((hidden, dim))

    def loss(kernels: tuple, x: jax.Array, of=product) -> jax.Array:
        h = of(jnp.tanh(x), kernels[0])
        return jnp.sum(jnp.sin(of(jax.nn.silu(h[..., 0, :]) * h[..., 1, :], kernels[1])))

    def turned(of) -> list:
        gradients = jax.jit(jax.grad(lambda *given: loss(*given, of=of)))
        compiled, count = gradients.lower(kernels, jnp.ones((*rows, dim))).compile(), int(np.prod(rows))
        wide = [(columns, count) for columns in (dim, hidden, 2 * hidden)]
        return [x for x in Program(compiled.as_text()).temporaries() if x.shape.dims in wide]

    assert turned(lambda x, kernel: jnp.tensordot(x, kernel, 1))
    assert not turned(product)
