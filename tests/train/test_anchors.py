import jax
import jax.numpy as jnp
import numpy as np

from train.anchors import cut_blocks, decay, sample_anchors, valid_anchors

MASK = 99


def response(length: int, first: int, end: int) -> np.ndarray:
    at = np.arange(length)
    return (at >= first) & (at < end)


def test_valid_anchors_have_a_following_position_in_the_loss():
    mask = np.stack([response(12, 3, 9), response(12, 0, 12), response(12, 5, 6)])
    expected = [[p for p in range(11) if row[p] and row[p + 1]] for row in mask]
    assert [list(np.flatnonzero(row)) for row in valid_anchors(jnp.asarray(mask))] == expected


def test_anchors_are_different_valid_positions_and_the_rest_is_marked():
    mask = jnp.asarray(np.stack([response(40, 3, 30), response(40, 10, 14), response(40, 0, 0)]))
    anchors, real = jax.device_get(sample_anchors(jax.random.key(0), mask, 8))
    for row, chosen, kept in zip(valid_anchors(mask), anchors, real, strict=True):
        assert kept.sum() == min(8, int(row.sum()))
        assert len(set(chosen)) == 8
        assert np.all(row[chosen[kept]])


def test_anchors_are_drawn_uniformly_and_anew_for_every_key():
    mask = jnp.asarray(response(20, 4, 17)[None])
    counts = np.zeros(20)
    for seed in range(200):
        counts[np.asarray(sample_anchors(jax.random.key(seed), mask, 3)[0][0])] += 1
    assert counts[:4].sum() == counts[16:].sum() == 0
    assert counts[4:16].min() > 25  # 50 each are expected


def test_blocks_hold_anchor_and_masks_and_label_their_own_positions():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (2, 30))
    mask = np.stack([response(30, 4, 20), response(30, 10, 30)])
    anchors, real = np.array([[4, 15, 18], [10, 22, 28]]), np.array([[True, True, True], [True, True, False]])
    blocks = cut_blocks(*map(jnp.asarray, (tokens, mask, anchors, real)), rows=6, mask_token=MASK)
    for b, a, w in np.ndindex(2, 3, 6):
        position = anchors[b, a] + w
        counts = w > 0 and real[b, a] and position < 30 and mask[b, position]
        assert blocks.weights[b, a, w] == counts
        assert blocks.inputs[b, a, w] == (MASK if w else tokens[b, anchors[b, a]])
        if counts:
            assert blocks.labels[b, a, w] == tokens[b, position]


def test_weights_decay_from_the_first_drafted_row():
    np.testing.assert_allclose(decay(5, 4.0), [0, 1, np.exp(-0.25), np.exp(-0.5), np.exp(-0.75)], rtol=1e-6)
