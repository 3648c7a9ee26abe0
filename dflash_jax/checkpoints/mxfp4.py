"""MXFP4, the format of gpt-oss experts: 4-bit values, 32 of which share a power of two (OCP Microscaling 1.0)."""

import numpy as np

GROUP = 32
# Sign, two exponent bits, one mantissa bit.
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BIAS = 127


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Flat f32 values of `blocks` (uint8, 16 bytes a group, low nibble first) and `scales` (uint8, one a group)."""
    values = np.empty((len(scales), GROUP), np.float32)
    pairs = blocks.reshape(-1, GROUP // 2)
    values[:, 0::2] = VALUES[pairs & 0xF]
    values[:, 1::2] = VALUES[pairs >> 4]
    return np.ldexp(values, scales.astype(np.int32)[:, None] - _BIAS).reshape(-1)
