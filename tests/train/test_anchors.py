import jax
import jax.numpy as jnp
import numpy as np

from train.anchors import cut_blocks, next_anchors, sample_anchors, valid_anchors

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


# Three documents, the second one without a response; the last one is followed by padding.
SEGMENTS = np.array([[1] * 12 + [2] * 5 + [3] * 9 + [0] * 4, [1] * 3 + [2] * 25 + [3] * 2])
PACKED = np.stack([response(30, 4, 12) | response(30, 19, 26), response(30, 2, 30)])


def test_valid_anchors_have_their_following_position_in_the_same_document():
    expected = [
        [p for p in range(29) if row[p] and row[p + 1] and of[p] == of[p + 1]]
        for row, of in zip(PACKED, SEGMENTS, strict=True)
    ]
    found = valid_anchors(jnp.asarray(PACKED), jnp.asarray(SEGMENTS))
    assert [list(np.flatnonzero(row)) for row in found] == expected


def test_each_document_has_its_share_of_the_anchors():
    """7 and 6 positions in the first row; 24 and 1 in the second, whose last document has one anchor at least."""
    valid = np.asarray(valid_anchors(jnp.asarray(PACKED), jnp.asarray(SEGMENTS)))
    for seed in range(20):
        key = jax.random.key(seed)
        anchors, real = jax.device_get(sample_anchors(key, jnp.asarray(PACKED), 6, jnp.asarray(SEGMENTS)))
        assert real.all()
        assert [len(set(row)) for row in anchors] == [6, 6]
        assert np.all(np.diff(anchors) > 0)
        of = np.take_along_axis(SEGMENTS, anchors, 1)
        assert np.take_along_axis(valid, anchors, 1).all()
        assert (of[0] == 2).sum() == 0 and 2 <= (of[0] == 1).sum() <= 4 and (of[1] == 3).sum() == 1


def test_anchors_of_packed_documents_are_drawn_uniformly():
    counts = np.zeros(30)
    draw = jax.jit(lambda key: sample_anchors(key, jnp.asarray(PACKED), 6, jnp.asarray(SEGMENTS))[0])
    for seed in range(300):
        counts[np.asarray(draw(jax.random.key(seed)))[0]] += 1
    valid = np.asarray(valid_anchors(jnp.asarray(PACKED), jnp.asarray(SEGMENTS)))[0]
    assert counts[~valid].sum() == 0
    assert counts[valid].min() > 90  # 129 or 150 are expected


def test_anchors_depend_on_the_row_in_the_global_batch_alone():
    key = jax.random.key(3)
    mask = jnp.asarray(np.stack([response(40, 3, 30)] * 4))
    whole, _ = sample_anchors(key, mask, 5)
    part, _ = sample_anchors(key, mask[:2], 5, None, jnp.array([3, 1]))
    np.testing.assert_array_equal(part, whole[jnp.array([3, 1])])
    assert len({tuple(row) for row in np.asarray(whole)}) == 4


def test_no_row_of_a_block_counts_in_the_next_document():
    tokens = np.random.default_rng(0).integers(0, 50, (2, 30))
    anchors, real = np.array([[4, 9, 23], [2, 24, 28]]), np.ones((2, 3), bool)
    blocks = cut_blocks(*map(jnp.asarray, (tokens, PACKED, anchors, real, SEGMENTS)), rows=5, mask_token=MASK)
    for b, a, w in np.ndindex(2, 3, 5):
        position, anchor = anchors[b, a] + w, anchors[b, a]
        inside = position < 30 and SEGMENTS[b, position] == SEGMENTS[b, anchor]
        assert blocks.weights[b, a, w] == (w > 0 and inside and PACKED[b, position])
        assert blocks.starts[b, a] == np.flatnonzero(SEGMENTS[b] == SEGMENTS[b, anchor])[0]


def test_replay_starts_where_verification_corrected_a_block():
    anchors = jnp.array([[4, 5, 8, 19], [2, 10, 20, 28]])
    real = jnp.array([[True] * 4, [True, True, False, True]])
    accepted = jnp.array([[2, 1, 3, 0], [3, 2, 1, 1]])
    found, kept = next_anchors(anchors, real, accepted, jnp.asarray(PACKED), jnp.asarray(SEGMENTS))
    # 7 twice, 12 is of the next document, 20; 6 is not of row 2's own document but 13 is; 30 is behind the end.
    assert [list(np.asarray(f)[np.asarray(k)]) for f, k in zip(found, kept, strict=True)] == [[7, 20], [13]]
