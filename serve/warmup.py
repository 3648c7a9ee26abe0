"""Before the first request: every program is compiled, and what a round costs is measured."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.decoding.sampling import Sampling
from dflash_jax.decoding.width import WidthController
from serve.config import Plan, Resolved
from serve.device import STOPS, Slots
from serve.passes import PassCosts
from serve.programs import Programs

Progress = Callable[[int, int], None]  # programs that are compiled, of how many
MOST_THREADS = 16  # that compile: each program takes memory meanwhile
TIMED_ROUNDS, TIMED_RUNS = 4, 3  # of each kind


def unseen(done: int, count: int) -> None:
    """Progress that nobody looks at."""


def warm_up(programs: Programs, controller: WidthController, progress: Progress = unseen) -> None:
    """Compile every program, and time the rounds so that the controller knows what they cost.

    `progress` is called before the first program and after each. What it raises ends the warm-up.
    """
    config = programs.config
    rounds, others = list(idle_rounds(config)), list(_others(programs))
    count = len(rounds) + len(others)
    progress(0, count)
    for done in _compiled(programs, rounds):
        progress(done, count)
    for plan in rounds:
        programs.rounds((), (), plan)  # so that its first call is no slower than others
    for done, call in enumerate(others, len(rounds) + 1):
        call()
        progress(done, count)
    for bucket in config.buckets:
        costs = _costs(programs, bucket)
        for settings in config.plans:
            controller.assume_costs((settings, bucket), costs)
        controller.assume_costs(config.masked(bucket, 1).load, costs)
    for shape in config.prefill:
        PassCosts(controller).assume(shape, _pass_cost(programs, shape))
    programs.clear()


def _compiled(programs: Programs, plans: Sequence[Plan]) -> Iterator[int]:
    """Compile rounds, several at once; how many there are after each."""
    # Several processes have to compile in the same order.
    threads = min(os.cpu_count() or 1, MOST_THREADS) if jax.process_count() == 1 else 1
    pool = ThreadPoolExecutor(threads)
    try:
        waiting = [pool.submit(programs.compile_rounds, plan) for plan in plans]
        for done, compiled in enumerate(as_completed(waiting), 1):
            compiled.result()
            yield done
    finally:
        pool.shutdown(cancel_futures=True)


def idle_rounds(config: Resolved) -> Iterator[Plan]:
    """All kinds of rounds that there are programs for."""
    for bucket in config.buckets:
        for settings in config.plans:
            for width in config.compiled:
                yield Plan(bucket, settings, width, 1, 0)


def _others(programs: Programs) -> Iterator[Callable[[], Any]]:
    """All other programs, for no request."""
    config = programs.config
    yield partial(_admit_nobody, programs)
    for shape in config.prefill:
        yield partial(programs.prefill, shape, ())
        if config.logprobs:
            yield partial(programs.prefill, shape, (), scored=True)
    for bucket in config.buckets if config.sizes.grammar else ():
        for width in config.masked_widths:
            yield partial(_check_nothing, programs, config.masked(bucket, width))


def _admit_nobody(programs: Programs) -> None:
    nobody = Sampling.pack(1, programs.pair.target.config.vocab_size)
    stops = np.full(STOPS, -1, np.int32)
    programs.put(0, [0], [], prompt=1, limit=1, stops=stops, cached=0, checkpoint=None, sampling=nobody)


def _check_nothing(programs: Programs, plan: Plan) -> None:
    programs.check(programs.propose((), plan), (), ())


def _costs(programs: Programs, bucket: int) -> dict[int, float]:
    """Seconds a round by width, of requests that have just begun."""
    config, slots = programs.config, np.arange(bucket, dtype=np.int32)
    costs: dict[int, float] = {}
    for width in config.compiled:
        plan = Plan(bucket, config.plans[0], width, TIMED_ROUNDS, 0)
        times = []
        for _ in range(TIMED_RUNS):
            programs.state = jax.block_until_ready(_begun(programs.state))
            start = time.perf_counter()
            jax.block_until_ready(programs.run_rounds(slots, plan))
            times.append(time.perf_counter() - start)
        costs[width] = min(times) / TIMED_ROUNDS
    return costs


def _pass_cost(programs: Programs, shape: tuple[int, int]) -> float:
    """Return the seconds of a pass over prompts that have just begun."""
    times = []
    for _ in range(TIMED_RUNS):
        jax.block_until_ready(programs.state)
        start = time.perf_counter()
        jax.block_until_ready(programs.prefill(shape, ()))
        times.append(time.perf_counter() - start)
    return min(times)


@partial(jax.jit, donate_argnames=("state",))
def _begun(state: Slots) -> Slots:
    """All slots with a request that runs, for timing: its pages are none."""
    d: Any = state.decode
    ones = jnp.ones_like(d.known)
    cache = replace(d.cache, lengths=jnp.zeros_like(d.cache.lengths))
    decode = replace(d, cache=cache, known=ones, limit=ones * d.tokens.shape[1], finished=jnp.zeros_like(d.finished))
    return replace(state, decode=decode).laid_out()
