"""Memory that the C library keeps: on the CPU, between steps it should, and behind the compiler it should not."""

import ctypes
import platform
from collections.abc import Callable
from typing import Any

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> None:
    """Tell glibc to keep freed memory.

    A step on the CPU allocates gigabytes of temporaries, and faulting them in anew each time takes longer than the
    arithmetic (measured on the embedded target, two busy cores: 5.9 s a step without, 2.3 s with).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 1 << 28), (_ARENA_MAX, 1)):
        mallopt(parameter, value)


def give_back() -> None:
    """Return to the system what is free now."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function that is compiled at its first call, whose shapes all later ones have to have.

    What the compiler took, a few hundred megabytes, is given back before the function's own temporaries are needed.
    """
    made: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not made:
            give_back()
            made.append(step.lower(*arguments).compile())  # pyrefly: ignore
            give_back()
        return made[0](*arguments)

    return call
