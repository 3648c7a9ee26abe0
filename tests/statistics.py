"""Goodness of fit: are these tokens a sample of that distribution?"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

# With fixed seeds a test below this is a defect and not bad luck: it would be wrong once in ten thousand times.
THRESHOLD = 1e-4


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value of `counts` under `probabilities` (any equal shapes): 0 where something impossible was seen.

    Cells that expect fewer than five are pooled, rarest first, as the test needs.
    """
    counts, probabilities = np.ravel(counts).astype(np.float64), np.ravel(probabilities).astype(np.float64)
    assert counts.shape == probabilities.shape
    np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-6)
    if np.any(counts[probabilities == 0]):
        return 0.0
    observed, expected = _pooled(counts, probabilities * counts.sum())
    if len(expected) < 2:
        return 1.0
    return float(stats.chi2.sf(np.sum((observed - expected) ** 2 / expected), len(expected) - 1))


def _pooled(observed: np.ndarray, expected: np.ndarray, least: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(expected)
    observed, expected = observed[order], expected[order]
    small = int(np.searchsorted(expected, least))
    while small < len(expected) and 0 < expected[:small].sum() < least:
        small += 1
    if expected[:small].sum() == 0:
        return observed[small:], expected[small:]
    pool = observed[:small].sum(), expected[:small].sum()
    return np.append(observed[small:], pool[0]), np.append(expected[small:], pool[1])


def histogram(samples: np.ndarray, vocab: int) -> np.ndarray:
    """Counts of token tuples: samples [N, K] -> [vocab] * K."""
    counts = np.zeros((vocab,) * samples.shape[1], np.int64)
    np.add.at(counts, tuple(samples.T), 1)
    return counts


def marginal(joint: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """The marginal of a joint distribution (or of counts) on `axes`, which must ascend."""
    return joint.sum(axis=tuple(axis for axis in range(joint.ndim) if axis not in axes))
