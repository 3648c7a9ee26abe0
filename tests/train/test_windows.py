import numpy as np
import pytest

from train.windows import PackedWindows, fixed_windows


def test_every_window_comes_once_an_epoch_in_a_new_order():
    data = PackedWindows(np.arange(90, dtype=np.int32), 10, seed=1)  # 7 windows
    batches = iter(data.batches(7))
    epochs = [[window[0] // 10 for window in next(batches)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1]


def test_batches_depend_on_the_seed_and_go_on_from_their_state():
    tokens = np.arange(1000, dtype=np.int32)
    one = iter(PackedWindows(tokens, 10, seed=5).batches(4))
    for _ in range(30):
        next(one)
    state = one.get_state()
    wanted = [next(one) for _ in range(3)]
    two = iter(PackedWindows(tokens, 10, seed=5).batches(4))
    two.set_state(state)
    np.testing.assert_array_equal([next(two) for _ in range(3)], wanted)
    assert not np.array_equal(next(iter(PackedWindows(tokens, 10, seed=6).batches(4))), next(iter(
        PackedWindows(tokens, 10, seed=5).batches(4)
    )))  # fmt: skip


@pytest.mark.parametrize("size", [35, 100, 1001])
def test_windows_stay_inside_and_do_not_overlap_within_an_epoch(size):
    data = PackedWindows(np.arange(size, dtype=np.int32), 10, seed=0)
    for epoch in range(3):
        windows = [data.window(epoch, item) for item in range(data.count)]
        assert all(len(window) == 11 and np.all(np.diff(window) == 1) for window in windows)
        inputs = np.concatenate([window[:-1] for window in windows])
        assert len(set(inputs)) == len(inputs)


def test_held_out_windows_are_spread_over_everything():
    windows = fixed_windows(np.arange(100), 10, 4)
    assert windows.shape == (4, 11)
    assert windows[0, 0] == 0 and windows[-1, -1] == 99
