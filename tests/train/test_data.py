import numpy as np
import pytest

from train.data import PackedWindows, fixed_windows, shuffled


def test_every_item_comes_once_an_epoch_in_a_new_order():
    places = [place for step in range(6) for place in shuffled(8, 4, seed=1, step=step)]
    epochs = [[item for epoch, item in places if epoch == wanted] for wanted in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.int32)
    one, two = (PackedWindows(tokens, 10, 4, seed=5) for _ in range(2))
    for step in (30, 2, 30):
        np.testing.assert_array_equal(one.batch(step), two.batch(step))
    assert not np.array_equal(one.batch(0), PackedWindows(tokens, 10, 4, seed=6).batch(0))


@pytest.mark.parametrize("size", [35, 100, 1001])
def test_windows_stay_inside_and_do_not_overlap_within_an_epoch(size):
    data = PackedWindows(np.arange(size, dtype=np.int32), 10, 1, seed=0)
    for epoch in range(3):
        windows = [data.window(epoch, item) for item in range(data.count)]
        assert all(len(window) == 11 and np.all(np.diff(window) == 1) for window in windows)
        inputs = np.concatenate([window[:-1] for window in windows])
        assert len(set(inputs)) == len(inputs)


def test_held_out_windows_are_spread_over_everything():
    windows = fixed_windows(np.arange(100), 10, 4)
    assert windows.shape == (4, 11)
    assert windows[0, 0] == 0 and windows[-1, -1] == 99
