"""Block-diffusion speculative decoding (DFlash) in JAX: `load` a pair, `generate` or `stream`.

The names below are imported when they are first used, so that `dflash --help` does not wait for jax.
"""

import importlib
from typing import Any

_HOMES = {
    "load": "pair",
    "Pair": "pair",
    "generate": "decoding.generate",
    "stream": "decoding.generate",
    "Generation": "decoding.output",
    "Piece": "decoding.output",
    "InputError": "errors",
    "__version__": "version",
}
__all__ = list(_HOMES)  # pyrefly: ignore


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
