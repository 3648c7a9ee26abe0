"""The sizes of a call, and what the TPU kernels move and compute at them."""

from dataclasses import dataclass
from typing import Any

from jax.experimental import pallas as pl

from pallas_kernels.gated_delta.pending import Pending


@dataclass(frozen=True)
class Sizes:
    """Dimensions as in the public functions; P pending rows, r value heads a key head; item sizes in bytes."""

    B: int
    W: int
    P: int
    R: int
    Hk: int
    r: int
    Dk: int
    Dv: int
    item: int  # of an activation
    kept: int  # of a pending k or u
    tap: int
    gate: int

    @classmethod
    def of(cls, state: Any, pending: Pending, tail: Any, mixed: Any, b: Any, taps: Any) -> "Sizes":
        """From the arguments of a call, arrays or their shapes."""
        B, W, Hk, _ = mixed.shape
        _, Hv, Dk, Dv = state.shape
        item, kept, tap, gate = (x.dtype.itemsize for x in (mixed, pending.u, taps, b))
        return cls(B, W, pending.u.shape[2], tail.shape[1], Hk, Hv // Hk, Dk, Dv, item, kept, tap, gate)

    @property
    def C(self) -> int:
        return 2 * self.Dk + self.r * self.Dv

    @property
    def Hv(self) -> int:
        return self.Hk * self.r

    def group(self, wanted: int) -> int:
        """Key heads of one grid step: at most `wanted`, dividing all of them."""
        return next(n for n in range(min(wanted, self.Hk), 0, -1) if self.Hk % n == 0)

    @property
    def state_bytes(self) -> int:
        return 4 * self.B * self.Hv * self.Dk * self.Dv

    def _rows(self, rows: int) -> int:
        """k and u of that many rows, as kept."""
        return self.B * rows * self.kept * (self.Hk * self.Dk + self.Hv * self.Dv)

    def _activations(self, passes: int = 1) -> int:
        """Everything that is read but the state and the pending rows, and the outputs; gates in so many passes."""
        mixed = self.B * (self.W + self.R) * self.Hk * self.C * self.item
        gates = 2 * passes * self.B * self.W * self.Hv * self.gate
        weights = (self.R + 1) * self.Hk * self.C * self.tap + 2 * 4 * self.Hv
        return mixed + gates + weights + self.B * self.W * self.Hv * self.Dv * self.item

    def _pending(self) -> int:
        return self._rows(self.P) + 4 * self.B * self.Hv * (self.P + 1)

    def block_bytes(self, tree: bool = False) -> int:
        """What a block moves: the state both ways, pending rows in, new ones and their decay out, activations."""
        links = 4 * self.B * self.W * (self.W + self.R + 1) if tree else 0
        new = self._rows(self.W) + 4 * self.B * self.Hv * self.W
        return 2 * self.state_bytes + self._pending() + new + self._activations() + links

    def prefill_bytes(self, groups: int, chunk: int) -> int:
        """What a prefill of W rows moves: the state both ways, pending rows in, activations, counts."""
        passes = groups if chunk < self.W else 1  # the gates of a chunk hold all heads, and each group reads them anew
        return 2 * self.state_bytes + self._pending() + self._activations(passes) + 4 * self.B

    def _rule_flops(self, rows: int, chunk: int) -> int:
        """Products of the state with k, q; of the chunk with itself; and the solution."""
        a_head = 2 * 2 * self.Dk * self.Dv + chunk * (2 * self.Dv + self.Dv)
        a_key_head = 2 * 2 * chunk * self.Dk + 2 * (self.R + 1) * self.C
        return self.B * rows * (self.Hv * a_head + self.Hk * a_key_head)

    def _fold_flops(self, rows: int) -> int:
        return 2 * self.B * self.Hv * rows * self.Dk * self.Dv

    def block_flops(self) -> int:
        """Of a block, without the passes that fp32 takes."""
        return self._fold_flops(self.P) + self._rule_flops(self.W, self.W)

    def prefill_flops(self, chunk: int) -> int:
        """Of a prefill, without the passes that fp32 takes."""
        return self._fold_flops(self.P + self.W) + self._rule_flops(self.W, min(chunk, self.W))

    def _exponentials(self, chunk: int) -> int:
        return self.B * self.W * (self.Hk * self.C + self.Hv * (chunk + 4))

    def block_cost(self, tree: bool) -> pl.CostEstimate:
        """For XLA's scheduler, and for whoever reads a compiled program."""
        return pl.CostEstimate(self.block_flops(), self._exponentials(self.W), self.block_bytes(tree))

    def prefill_cost(self, groups: int, chunk: int) -> pl.CostEstimate:
        """As `block_cost`."""
        moved = self.prefill_bytes(groups, chunk)
        return pl.CostEstimate(self.prefill_flops(chunk), self._exponentials(chunk), moved)
