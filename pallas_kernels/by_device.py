"""A kernel where the device that a program is lowered for can run it, and the reference elsewhere.

`jax.lax.platform_dependent` tells "cuda" from "tpu", not one generation of cards from another. The devices are known
when a program is lowered, and so compile-only devices are looked at, not those of this machine.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

HOPPER = "9.0"  # compute capability of the cards that Mosaic GPU kernels with WGMMA run on: H100, H200, GH200
MUTABLE = "InternalMutableArrayEffect"  # of a kernel that is given references; it ends where they do
log = logging.getLogger("pallas_kernels")

by_device_p = Primitive("by_device")
by_device_p.multiple_results = True
# jax need not take the kernels in it apart before lowering: `lower_fun` does that with the one that is chosen.
by_device_p.is_high = lambda *avals, **given: False  # pyrefly: ignore


def by_device(name: str, kernel: Callable[..., Any], reference: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return a function that is `kernel` on cards that run it, and `reference` on others of its platform.

    Both take and give the same arrays, and are differentiated each in its own way. Without a reference, lowering for a
    card that does not run the kernel is a ValueError.
    """
    call: Any = jax.custom_vjp(_either(name, kernel, reference))

    def forward(*arguments: Any) -> Any:
        own = jax.eval_shape(partial(jax.vjp, kernel), *arguments)[1]
        other = None if reference is None else jax.eval_shape(partial(jax.vjp, reference), *arguments)[1]

        def of_kernel(*given: Any) -> Any:
            return *jax.vjp(kernel, *given), _zeros(other)

        def of_reference(*given: Any) -> Any:
            out, pull = jax.vjp(reference or kernel, *given)
            return out, _zeros(own), pull

        # Each has residuals of its own. Those of the one that is not lowered are zeros that nobody reads.
        out, *pulls = _either(name, of_kernel, None if reference is None else of_reference)(*arguments)
        return out, pulls

    def backward(pulls: Any, cotangents: Any) -> Any:
        def pulled(which: int) -> Callable[..., Any]:
            return lambda pulls, cotangents: jax.tree.map(_or_none, pulls[which](cotangents))

        chosen = _either(name, pulled(0), None if reference is None else pulled(1))
        return chosen(pulls, cotangents)

    call.defvjp(forward, backward)
    return call


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _or_none(cotangent: Any) -> Any:
    """Return the cotangent of an array of real numbers; whole ones have none."""
    return None if cotangent.dtype == jax.dtypes.float0 else cotangent


def _either(name: str, kernel: Callable[..., Any], reference: Callable[..., Any] | None) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        flat, tree = jax.tree.flatten(arguments)
        made: Any = jax.make_jaxpr(lambda *x: kernel(*tree.unflatten(x)), return_shape=True)(*flat)
        own, shapes = made
        if any(type(effect).__name__ != MUTABLE for effect in own.effects):  # the interpreter's, which needs no card
            return kernel(*arguments)
        other = None if reference is None else jax.make_jaxpr(lambda *x: reference(*tree.unflatten(x)))(*flat)
        out = by_device_p.bind(*flat, name=name, kernel=own, reference=other)
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return call


def runs_kernels(devices: Sequence[Any]) -> bool:
    """Return whether devices run kernels that are made for Hopper.

    A program that is exported where there is no GPU is made for no card that is known: for Hopper, as Mosaic does.
    """
    cards = [device for device in devices if device.platform != "cpu"]
    return all(getattr(device, "compute_capability", None) == HOPPER for device in cards)


@cache
def _say(name: str, kind: str, kernel: bool) -> None:
    """Log, once a kernel and kind of device, which implementation is taken."""
    if kernel:
        log.info("%s on %s: the kernel", name, kind)
    else:
        log.warning("%s on %s: the reference, as the kernel is made for H100 and H200", name, kind)


def devices_of(ctx: Any) -> Sequence[Any]:
    """Return the devices that a program is lowered for, compile-only ones included."""
    backend = ctx.module_context.backend
    return () if backend is None else backend.devices()


def _lower(ctx: Any, *values: Any, name: str, kernel: ClosedJaxpr, reference: ClosedJaxpr | None) -> Any:
    devices = devices_of(ctx)
    chosen = kernel if runs_kernels(devices) else reference
    kind = devices[0].device_kind if devices else "a device that is not known"
    if chosen is None:
        raise ValueError(
            f"{name}: implementation 'gpu' is made for H100 and H200, not for {kind}; give implementation=None"
        )
    _say(name, kind, chosen is kernel)
    return mlir.lower_fun(jaxpr_as_fun(chosen), multiple_results=True)(ctx, *values)


def _lower_kernel(ctx: Any, *values: Any, name: str, kernel: ClosedJaxpr, reference: ClosedJaxpr | None) -> Any:
    """Lower the kernel where there is no card to look at: it is interpreted."""
    return mlir.lower_fun(jaxpr_as_fun(kernel), multiple_results=True)(ctx, *values)


def _batch(values: Any, axes: Any, *, name: str, kernel: ClosedJaxpr, reference: ClosedJaxpr | None) -> Any:
    both = (None if jaxpr is None else jax.vmap(jaxpr_as_fun(jaxpr), axes) for jaxpr in (kernel, reference))
    own, other = both
    out = _either(name, own, other)(*values)  # pyrefly: ignore[bad-argument-type]
    return out, [0] * len(out)


by_device_p.def_abstract_eval(lambda *_, name, kernel, reference: kernel.out_avals)
by_device_p.def_impl(lambda *values, **given: jax.jit(lambda *x: by_device_p.bind(*x, **given))(*values))
batching.primitive_batchers[by_device_p] = _batch
mlir.register_lowering(by_device_p, _lower_kernel)
mlir.register_lowering(by_device_p, _lower, platform="cuda")
