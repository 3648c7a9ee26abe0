"""W rows a sequence against their cache and each other: verification, plain decoding and drafting."""

from pallas_kernels.block_attention.reference import block_attention, write_rows

__all__ = ["block_attention", "write_rows"]
