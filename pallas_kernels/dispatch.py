"""One call, several implementations: the platform a program is lowered for chooses, or the caller does."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax

Implementation = Literal["reference", "tpu", "gpu"]


def dispatch(
    implementation: Implementation | None,
    *arguments: Any,
    reference: Callable[..., Any],
    tpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
) -> Any:
    """Call the implementation asked for, or that of the platform (`jax.lax.platform_dependent`: decided in lowering).

    An implementation that is None does not take these shapes or options: its platform runs the reference.
    ValueError if such a one is asked for by name.
    """
    chosen = {"reference": reference, "tpu": tpu, "gpu": gpu}
    if implementation is None:
        kernels = {name: kernel for name, kernel in (("tpu", tpu), ("cuda", gpu)) if kernel is not None}
        if not kernels:
            return reference(*arguments)
        return jax.lax.platform_dependent(*arguments, default=reference, **kernels)
    if implementation not in chosen:
        raise ValueError(f"implementation is {implementation!r}; give one of {', '.join(chosen)}, or None")
    if (call := chosen[implementation]) is None:
        raise ValueError(f"the {implementation} implementation does not take these shapes; give implementation=None")
    return call(*arguments)


@cache
def tuning(file: str) -> dict[str, Any]:
    """The tuned sizes of a kernel: tuning.json beside `file`, by device kind ("default" for all others)."""
    return json.loads((Path(file).parent / "tuning.json").read_text())
