"""The gated delta rule: blocks of rows whose commit is deferred, and prefill."""

from pallas_kernels.gated_delta.reference import Pending, Rows, fold, gated_delta_block, gated_delta_prefill

__all__ = ["Pending", "Rows", "fold", "gated_delta_block", "gated_delta_prefill"]
