"""The vocabulary product: whole logits, or only what sampling needs of them."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

from dflash_jax.sharding import constrain, mesh_axes, per_shard
from pallas_kernels.head_sampling import Projection, Samples, head_sampling, logits


@dataclass(frozen=True)
class Head:
    """Made anew in each program from a target's weights; a drafter has its own multiplier and soft cap."""

    weight: Float[Array, "_ _"]
    projection: Projection

    def __call__(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Logits in fp32."""
        return constrain(logits(self.projection, hidden, self.weight), "batch", "...", "vocab")

    @property
    def vocab(self) -> int:
        """Tokens in the vocabulary."""
        return self.projection.sizes(self.weight)[1]

    def sample(
        self,
        hidden: Float[Array, "B W D"],
        given: Int32[Array, "B W C"] | None = None,
        temperature: Float32[Array, "B"] | None = None,
        keys: UInt32[Array, "B W 2"] | None = None,
        *,
        slots: int = 1,
    ) -> Samples:
        """Samples of each row, with axes [B, W]; on accelerators no logits are written. See `head_sampling`."""
        B, W = hidden.shape[:2]

        def flat(rows: Array | None) -> Array | None:
            return None if rows is None else rows.reshape(B * W, *rows.shape[2:])

        sample = partial(
            head_sampling,
            projection=self.projection,
            slots=min(slots, self.vocab),
            axis_name=mesh_axes("vocab") or None,
        )
        weight = ("vocab", None) if self.projection.layout == "vd" else (None, "vocab")
        rows = ("batch",)
        out = per_shard(sample, [rows, weight, rows, rows, rows], rows)(
            hidden.reshape(B * W, -1),
            self.weight,
            flat(given),
            None if temperature is None else jnp.repeat(temperature, W),
            flat(keys),
        )
        return jax.tree.map(lambda rows: rows.reshape(B, W, *rows.shape[1:]), out)
