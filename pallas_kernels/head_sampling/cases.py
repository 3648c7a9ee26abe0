"""The head of real models: what `make aot` compiles."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.head_sampling import Projection, head_sampling, tpu

MODELS = {
    "Qwen3.5-397B-A17B": (248_320, 4096),
    "Qwen3.5-35B-A3B": (248_320, 2048),
    "Qwen3-Coder-30B-A3B": (151_936, 2048),
    "gpt-oss-120b": (201_088, 2880),
}
ROWS = [(1, 1), (1, 16), (1, 64), (32, 1), (32, 16), (32, 64)]  # batch, W
CANDIDATES = 16  # that a draft is drawn from


def cases() -> Iterator[Case]:
    """Greedy rounds of every model, whole and on one of 8 devices; draws and top-k of the largest, and tied ones."""
    for name, (vocab, model) in MODELS.items():
        for batch, width in ROWS:
            yield _case(name, vocab, model, batch, width, "greedy")
        for batch in (1, 32):
            yield _case(f"{name}, vocabulary/8", vocab // 8, model, batch, 16, "greedy")
    name, (vocab, model) = next(iter(MODELS.items()))
    for batch in (1, 32):
        for job in ("draw", "draw beside candidates", "top-k"):
            yield _case(name, vocab, model, batch, 16, job)
        yield _case(f"{name}, tied", vocab, model, batch, 16, "greedy", layout="vd")
        yield _case(f"{name}, vocabulary/8", vocab // 8, model, batch, 16, "draw beside candidates")


def _case(name: str, vocab: int, model: int, batch: int, width: int, job: str, layout: Any = "dv") -> Case:
    rows, half = batch * width, jnp.bfloat16
    draws = job.startswith("draw")
    slots = 128 if job == "top-k" else 1
    arguments = (
        jax.ShapeDtypeStruct((rows, model), half),
        jax.ShapeDtypeStruct((model, vocab) if layout == "dv" else (vocab, model), half),
        jax.ShapeDtypeStruct((rows, CANDIDATES), jnp.int32) if job == "draw beside candidates" else None,
        jax.ShapeDtypeStruct((rows,), jnp.float32) if draws else None,
        jax.ShapeDtypeStruct((rows, 2), jnp.uint32) if draws else None,
    )
    projection = Projection(layout)
    function = partial(head_sampling, projection=projection, slots=slots)
    estimate = tpu.cost(*arguments, projection=projection, slots=slots)
    every = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
    return Case(
        name=f"{name}, {job}, batch {batch}, W {width}",
        function=function,
        arguments=arguments,
        must_move=sum(x.size * x.dtype.itemsize for x in every),
        moved=estimate.bytes_accessed,
        flops=2 * rows * model * vocab,
        whole=(np.random.default_rng(0).integers(0, vocab, (rows, CANDIDATES)),) if arguments[2] is not None else (),
    )
