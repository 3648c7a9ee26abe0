"""One call, several implementations: the platform a program is lowered for chooses, or the caller does."""

import json
from collections.abc import Callable, Hashable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jax

from pallas_kernels.by_device import by_device

Implementation = Literal["reference", "tpu", "gpu"]


def dispatch(
    implementation: Implementation | None,
    *arguments: Any,
    reference: Callable[..., Any],
    tpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
    **options: Hashable,
) -> Any:
    """Call the implementation asked for, or that of the device: both are decided when the program is lowered.

    The `gpu` one is taken on cards that run it (see `pallas_kernels.by_device`); others run the reference. An
    implementation that is None does not take these shapes or options: its platform runs the reference.
    ValueError if such a one is asked for by name. Give functions of a module, which the layers of a model share.
    """
    chosen = {"reference": reference, "tpu": tpu, "gpu": gpu}
    if implementation is None:
        return _by_platform(arguments, reference, tpu, gpu, tuple(sorted(options.items())))
    if implementation not in chosen:
        raise ValueError(f"implementation is {implementation!r}; give one of {', '.join(chosen)}, or None")
    if (call := chosen[implementation]) is None:
        raise ValueError(f"the {implementation} implementation does not take these shapes; give implementation=None")
    if implementation == "gpu":
        return by_device(_name(call), partial(call, **options), None)(*arguments)
    return call(*arguments, **options)


def _name(kernel: Callable[..., Any]) -> str:
    """Return the folder of a kernel."""
    return kernel.__module__.split(".")[1]


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _by_platform(
    arguments: tuple[Any, ...], reference: Callable[..., Any], tpu: Any, gpu: Any, options: tuple[tuple[str, Any], ...]
) -> Any:
    """Jitted, so that what is alike in all layers is traced and lowered once: a kernel for GPUs takes half a second."""
    default = partial(reference, **dict(options))
    kernels: dict[str, Callable[..., Any]] = {}
    if tpu is not None:
        kernels["tpu"] = partial(tpu, **dict(options))
    if gpu is not None:
        kernels["cuda"] = by_device(_name(gpu), partial(gpu, **dict(options)), default)
    return jax.lax.platform_dependent(*arguments, default=default, **kernels) if kernels else default(*arguments)


@cache
def tuning(file: str) -> dict[str, Any]:
    """The tuned sizes of a kernel: tuning.json beside `file`, by device kind ("default" for all others)."""
    return json.loads((Path(file).parent / "tuning.json").read_text())
