"""Blocks of rows at many anchors of one sequence against its shared context: the drafter's training attention."""

from pallas_kernels.anchored_attention.reference import anchored_attention

__all__ = ["anchored_attention"]
