import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import block_attention, write_rows
from tests.pallas_kernels.blocks import Block

B, W, N, K, H, S = 2, 4, 4, 2, 8, 16
LENGTHS = np.array([0, 9])


def brute_force(q, keys, values, own_k, own_v, causal, window, sinks):
    out = np.zeros_like(q)
    for b, w, n in np.ndindex(B, W, N):
        k, v = (
            [*cache[b, n // 2, : LENGTHS[b]], *own[b, :, n // 2]] for cache, own in ((keys, own_k), (values, own_v))
        )
        at = LENGTHS[b] + w
        seen = [s for s in range(len(k)) if (s <= at or not causal) and (window is None or s > at - window)]
        weights = np.exp([0.3 * k[s] @ q[b, w, n] for s in seen])
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
        out[b, w, n] = weights / total @ np.array([v[s] for s in seen])
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("sink", [False, True])
def test_equals_attention_row_by_row(causal, window, sink):
    rng = np.random.default_rng(0)
    shapes = [(B, W, N, H), (B, K, S, H), (B, K, S, H), (B, W, K, H), (B, W, K, H)]
    given = [rng.normal(size=shape) for shape in shapes]
    sinks = rng.normal(size=N) if sink else None
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (given, sinks))
    out, keys, values = block_attention(
        *single[0], jnp.asarray(LENGTHS), causal=causal, window=window, scale=0.3, sinks=single[1]
    )
    np.testing.assert_allclose(out, brute_force(*given, causal, window, sinks), rtol=2e-4, atol=2e-6)
    for cache, before, rows in ((keys, given[1], given[3]), (values, given[2], given[4])):
        for b, n in enumerate(LENGTHS):
            np.testing.assert_allclose(cache[b, :, n : n + W], rows[b].swapaxes(0, 1), rtol=1e-6)
            np.testing.assert_allclose(cache[b, :, :n], before[b, :, :n], rtol=1e-6)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"window": 9, "sinks": True, "soft_cap": 3.0},
        {"causal": False, "write": False},
        {"tree": True, "window": 4, "sinks": True},
        {"tree": True, "shared_mask": True, "write": False},
        {"packed": 2, "sinks": True, "tree": True},
        {"dtype": "bfloat16"},
        {"lengths": (0, 57, 16, 15), "width": 7},
        {"lengths": (5, 23, 0), "width": 37, "window": 20},
        {"lengths": (300, 129, 0), "pages": 20, "window": 150, "sinks": True, "tree": True},
        {"lengths": (128, 256), "pages": 17, "soft_cap": 3.0},
        {"lengths": (95, 96, 97, 111, 300), "pages": 20, "window": 96, "causal": False, "write": False},
        {"lengths": (300, 129, 0, 16), "pages": 20, "window": 18, "tree": True, "sinks": True},
        {"lengths": (32, 33), "window": 2},
        {"lengths": (0, 7, 8, 9, 44), "width": 12, "window": 9, "write": False},
        {"lengths": (3, 41), "window": 1, "write": False},
    ],
)
def test_equals_a_float64_truth_and_touches_only_its_own_rows(paged: bool, change: dict):
    block = Block(**{"lengths": (3, 41), "width": 12, "head_dim": 8, "paged": paged, **change})
    # The dense reference multiplies what is not committed by zero; pages may hold anything.
    unused = np.nan if paged else 0.0
    block.check(block.run(unused, implementation="reference"), unused=unused)


def test_it_does_not_matter_where_pages_lie():
    arrays, options = Block((3, 41, 200), 9, head_dim=8, window=150, tree=True, pages=14).arguments()
    out = block_attention(*arrays, **options)[0]
    moved = np.random.default_rng(1).permutation(len(arrays[1]))
    arrays[1:3] = (pool[moved] for pool in arrays[1:3])
    table = options["page_table"]
    there = jnp.where(table < 0, -1, jnp.argsort(jnp.asarray(moved))[table])
    assert not np.array_equal(there, table)
    np.testing.assert_array_equal(block_attention(*arrays, **options | {"page_table": there})[0], out)


def test_pages_before_the_window_are_not_read():
    block = Block((300, 129, 5), 8, head_dim=8, window=20, pages=20, write=False)
    arrays, options = block.arguments()
    wanted = block_attention(*arrays, **options)[0]
    for b, length in enumerate(block.lengths):
        old = options["page_table"][b, : max(0, length - 19) // block.page]
        arrays[1:3] = (pool.at[old].set(jnp.nan) for pool in arrays[1:3])
    np.testing.assert_array_equal(block_attention(*arrays, **options)[0], wanted)


def test_rows_without_a_page_are_dropped():
    block = Block((3, 14), 5, head_dim=8)
    arrays, options = block.arguments()
    none = jnp.asarray([[-1, -1, -1, -1], [2, -1, -1, -1]])
    _, keys, values = block_attention(*arrays, **options | {"page_table": none})
    for cache, before, rows in zip((keys, values), block.caches(np.nan), block.made["rows"], strict=True):
        expected = before.copy()
        expected[2, :, 14:] = rows[1, :2].swapaxes(0, 1)
        np.testing.assert_array_equal(cache, expected.astype(np.float32))


@pytest.mark.parametrize("packed", [1, 2])
def test_counted_rows_into_pages(packed: int):
    block = Block((3, 14), 5, head_dim=8, packed=packed)
    arrays, options = block.arguments()
    rows = jnp.swapaxes(arrays[3], 1, 2)
    cache = write_rows(arrays[1], rows, arrays[5], jnp.asarray([2, 4]), page_table=options["page_table"])
    expected = block.caches(np.nan)[0]
    for b, count in enumerate((2, 4)):
        for i in range(count):
            entry, row = block.at(b, block.lengths[b] + i)
            expected[entry, :, row] = block.made["rows"][0][b, i]
    np.testing.assert_array_equal(block.unpacked(np.asarray(cache)), expected.astype(np.float32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depths": jnp.zeros((1, 5), jnp.int32)}, "has a mask too"),
        ({"page_table": None}, "an entry a sequence"),
        ({"implementation": "fpga"}, "give one of reference, tpu, gpu"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str):
    arrays, options = Block((3, 14), 5, head_dim=8).arguments()
    with pytest.raises(ValueError, match=message):
        block_attention(*arrays, **options | change)
