"""The test of the tests: a chi-square that never complains would prove nothing."""

import numpy as np
from scipy import stats

from tests.statistics import chi_square, histogram, marginal

PROBABILITIES = np.array([0.5, 0.3, 0.1, 0.0999, 0.0001, 0.0])


def test_p_values_of_true_samples_are_uniform():
    rng = np.random.default_rng(0)
    values = [chi_square(rng.multinomial(5000, PROBABILITIES), PROBABILITIES) for _ in range(400)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_a_wrong_distribution_is_seen():
    rng = np.random.default_rng(1)
    wrong = np.array([0.47, 0.33, 0.1, 0.0999, 0.0001, 0.0])
    assert chi_square(rng.multinomial(20000, wrong), PROBABILITIES) < 1e-8


def test_an_impossible_token_is_seen_once():
    assert chi_square(np.array([5000, 3000, 1000, 1000, 0, 1]), PROBABILITIES) == 0


def test_agrees_with_scipy_where_nothing_is_pooled():
    counts = np.array([[210, 290], [260, 240]])
    expected = stats.chisquare(counts.ravel(), np.full(4, 250.0)).pvalue
    np.testing.assert_allclose(chi_square(counts, np.full((2, 2), 0.25)), expected)


def test_histogram_and_marginal():
    samples = np.array([[0, 1], [0, 1], [2, 0]])
    counts = histogram(samples, 3)
    assert counts[0, 1] == 2 and counts[2, 0] == 1 and counts.sum() == 3
    np.testing.assert_array_equal(marginal(counts, [0]), [2, 0, 1])
    np.testing.assert_array_equal(marginal(counts, [1]), [1, 2, 0])
