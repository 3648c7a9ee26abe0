"""Rows and vocabularies for the tests of the head, and the truth in float64."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pallas_kernels.head_sampling import Projection


@dataclass(frozen=True)
class Drawn:
    """Arguments of `head_sampling`. Small whole numbers: products are exact in any order, and ties are common."""

    arrays: dict
    static: dict

    @property
    def positional(self):
        names = ("hidden", "weight", "given", "temperature", "keys", "start")
        return tuple(self.arrays[name] for name in names)

    def rows(self, chosen):
        """The same with these rows alone."""
        by_row = ("hidden", "given", "temperature", "keys")
        arrays = {k: v[chosen] if k in by_row and v is not None else v for k, v in self.arrays.items()}
        return replace(self, arrays=arrays)


def draw(
    seed, rows, vocab, *, layout="dv", slots=1, given=2, kind="draw", padded=0, start=0, dtype=jnp.float32, model=8
):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-2, 3, (model, vocab))
    arrays = {
        "hidden": jnp.asarray(rng.integers(-2, 3, (rows, model)), dtype),
        "weight": jnp.asarray(weight if layout == "dv" else weight.T, dtype),
        # Some are outside the shard, and some twice there.
        "given": jnp.asarray(start + rng.integers(-3, vocab + 3, (rows, given)), jnp.int32) if given else None,
        "temperature": None,
        "keys": None,
        "start": jnp.int32(start),
    }
    if kind != "top":
        arrays["temperature"] = jnp.asarray(rng.choice([1e-30, 0.3, 1.0, 4.0], rows), jnp.float32)
    if kind == "draw":
        arrays["keys"] = jnp.asarray(rng.integers(0, 2**32, (rows, 2)), jnp.uint32)
    projection = Projection(layout, *((0.5, 4.0) if seed % 2 else (1.0, None)))
    return Drawn(
        arrays, {"projection": projection, "slots": slots, "vocab": start + vocab - padded if padded else None}
    )


drawn = st.builds(
    draw,
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    vocab=st.integers(130, 700) | st.sampled_from([128, 256, 384]),
    layout=st.sampled_from(["dv", "vd"]),
    slots=st.sampled_from([1, 1, 5, 64]),
    given=st.sampled_from([0, 1, 3]),
    kind=st.sampled_from(["top", "total", "draw"]),
    padded=st.sampled_from([0, 1, 60]),
    start=st.sampled_from([0, 217344]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)


def truth(case):
    """Logits [R, V] in float64, -inf for ids that do not exist, and the ids."""
    a, projection = case.arrays, case.static["projection"]
    weight = np.asarray(a["weight"], np.float64)
    logits = np.asarray(a["hidden"], np.float64) @ (weight if projection.layout == "dv" else weight.T)
    logits *= projection.multiplier
    if projection.soft_cap:
        logits = np.tanh(logits / projection.soft_cap) * projection.soft_cap
    ids = int(a["start"]) + np.arange(logits.shape[1])
    if case.static["vocab"] is not None:
        logits[:, ids >= case.static["vocab"]] = -np.inf
    return logits, ids
