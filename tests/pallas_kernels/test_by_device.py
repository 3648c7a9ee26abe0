"""A kernel runs on cards that it is made for; what a program is lowered for decides, and is said once."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import by_device
from pallas_kernels.by_device import by_device as choose
from pallas_kernels.by_device import runs_kernels
from pallas_kernels.dispatch import dispatch


def card(capability, platform="gpu", kind="a card"):
    return SimpleNamespace(compute_capability=capability, platform=platform, device_kind=kind)


@pytest.mark.parametrize(
    ("devices", "runs"),
    [
        ([card("9.0")], True),
        ([card("9.0"), card("9.0")], True),
        ([card("9.0"), card("8.0")], False),
        *(([card(capability)], False) for capability in ("8.0", "8.6", "8.9", "10.0", "10.3", "12.0", "gfx942")),
        ([SimpleNamespace(platform="rocm")], False),
        ([card(None, "cpu")], True),  # exported for no card that is known
    ],
)
def test_only_hopper_runs_kernels(devices, runs):
    assert runs_kernels(devices) is runs


def double(x):
    return {"y": x * 2, "kernel": jnp.zeros(3)}


def twice(x):
    return {"y": x + x, "kernel": jnp.ones(3)}


def lowered_for(monkeypatch, devices, function, *arguments):
    """Lower for CUDA as if these were the devices."""
    by_device._say.cache_clear()
    monkeypatch.setattr(by_device, "devices_of", lambda ctx: devices)
    return jax.jit(lambda *x: function(*x)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_what_is_lowered_is_that_of_the_card_and_is_said_once(monkeypatch, caplog):
    x = jnp.arange(4.0)
    called = choose("doubling", double, twice)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        hopper = lowered_for(monkeypatch, [card("9.0", kind="H")], lambda x: (called(x), called(x + 1)), x)
        assert caplog.messages == ["doubling on H: the kernel"]
        caplog.clear()
        ampere = lowered_for(monkeypatch, [card("8.0", kind="A")], lambda x: (called(x), called(x + 1)), x)
        assert caplog.messages == ["doubling on A: the reference, as the kernel is made for H100 and H200"]
    assert "multiply" in hopper and "multiply" not in ampere


def test_a_kernel_asked_for_by_name_is_refused_on_other_cards(monkeypatch):
    def asked(x):
        return dispatch("gpu", x, reference=twice, gpu=double)

    with pytest.raises(ValueError, match=r"implementation 'gpu' is made for H100 and H200, not for A; give impl"):
        lowered_for(monkeypatch, [card("8.0", kind="A")], asked, jnp.arange(4.0))
    assert "multiply" in lowered_for(monkeypatch, [card("9.0")], asked, jnp.arange(4.0))


def test_it_is_mapped_over_and_called_as_other_functions():
    x = jnp.arange(12.0).reshape(3, 4)
    called = choose("doubling", double, twice)
    np.testing.assert_array_equal(jax.vmap(called)(x)["y"], x * 2)
    np.testing.assert_array_equal(jax.jit(jax.vmap(called, in_axes=1, out_axes=1))(x)["y"], x * 2)
    np.testing.assert_array_equal(called(x)["y"], x * 2)


def slow_cube(x, n):
    return jnp.sum(x**n) * x


@jax.custom_vjp
def cube(x, n):
    return slow_cube(x, n)


cube.defvjp(lambda x, n: (slow_cube(x, n), (x, n)), lambda given, ct: (jnp.sum(ct) * given[0] * 100, None))


def test_each_is_differentiated_in_its_own_way(monkeypatch):
    """The kernel by a rule of its own, as kernels have it; the reference by jax."""
    called, x = choose("cubing", cube, slow_cube), jnp.arange(3.0)
    grad = jax.grad(lambda x: jnp.sum(called(x, 3)))
    np.testing.assert_allclose(grad(x), 300 * x)  # no card: the kernel
    hopper = lowered_for(monkeypatch, [card("9.0")], grad, x)
    ampere = lowered_for(monkeypatch, [card("8.0")], grad, x)
    assert "1.000000e+02" in hopper and "1.000000e+02" not in ampere
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(jax.vmap(lambda y: called(y, 3))(x[None])))(x), 300 * x)
