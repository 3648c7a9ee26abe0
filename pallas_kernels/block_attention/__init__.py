"""W rows a sequence against their cache and each other: verification, plain decoding and drafting."""

from pallas_kernels.block_attention.attention import block_attention
from pallas_kernels.block_attention.rows import write_rows

__all__ = ["block_attention", "write_rows"]
