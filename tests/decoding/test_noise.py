import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dflash_jax.decoding import noise
from dflash_jax.decoding.noise import Purpose
from pallas_kernels.head_sampling import noise as numbers

gumbel = jax.jit(noise.gumbel, static_argnums=(2, 3))
uniform = jax.jit(noise.uniform)
SEEDS = jnp.arange(40, dtype=jnp.uint32) + jnp.uint32(2**32 - 20)
POSITIONS = jnp.arange(5, dtype=jnp.int32) + 100 * jnp.arange(40, dtype=jnp.int32)[:, None]


@pytest.mark.parametrize(
    ("sample", "law"), [(gumbel(SEEDS, POSITIONS, 60), "gumbel_r"), (uniform(SEEDS, POSITIONS), "uniform")]
)
def test_law(sample, law):
    assert np.all(np.isfinite(sample))
    assert stats.kstest(np.ravel(sample), law).pvalue > 1e-3


def test_the_extreme_bits_give_finite_noise(monkeypatch):
    for bits in (0, 2**32 - 1):
        monkeypatch.setattr(numbers, "threefry", lambda k0, k1, ids, bits=bits: jnp.full_like(k0 + k1 + ids, bits))
        assert np.all(np.isfinite(noise.gumbel(SEEDS, POSITIONS, 3)))
        number = noise.uniform(SEEDS, POSITIONS)
        assert np.all((number > 0) & (number < 1))


def test_small_probabilities_are_resolved(monkeypatch):
    """The largest noise of a vocabulary of millions is not rounded to a coarse grid."""
    monkeypatch.setattr(numbers, "threefry", lambda k0, k1, ids: ids)
    assert len(np.unique(noise.gumbel(SEEDS[:1], POSITIONS[:1, :1], 1000))) == 1000


def test_a_number_depends_on_seed_position_and_purpose_alone():
    numbers = np.asarray(gumbel(SEEDS, POSITIONS, 7))
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(gumbel(SEEDS[order], POSITIONS[order], 7), numbers[order])
    np.testing.assert_array_equal(gumbel(SEEDS[3:4], POSITIONS[3:4, 2:3], 7)[0, 0], numbers[3, 2])
    np.testing.assert_array_equal(gumbel(SEEDS, POSITIONS, 5), numbers[..., :5])


def test_every_seed_position_and_purpose_has_its_own_numbers():
    every = [np.ravel(gumbel(SEEDS, POSITIONS, 7, purpose)) for purpose in Purpose]
    assert len(np.unique(np.concatenate(every))) > 0.999 * 3 * 40 * 5 * 7
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert stats.pearsonr(every[one], every[other]).pvalue > 1e-3
