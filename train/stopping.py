"""Ending early and well: SIGTERM, which schedulers send before they take a machine away."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def listen(*, together: bool = True) -> Iterator[Callable[[int], bool]]:
    """Until the block ends SIGTERM kills nothing; call what is yielded with each step to know if it is the last one.

    Where processes have been joined, jax itself listens, and all of them stop at the same step. Those that do not go
    in step with each other (not `together`) do not stop: their work has to be safe at any moment.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point if together else lambda step: False
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only it can listen
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
