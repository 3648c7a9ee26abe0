"""How accelerators are made to multiply: seen in what is lowered for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dflash_jax
from dflash_jax.models.layers import linear


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
