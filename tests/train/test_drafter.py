import functools
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from tests.train.small import CONFIG, MASK, responses
from train.drafter import tap_ids, train_drafter


@pytest.mark.parametrize(
    ("layers", "count", "expected"), [(8, 3, (1, 3, 5)), (36, 5, (1, 9, 17, 25, 33)), (8, 1, (4,))]
)
def test_taps_are_spread_and_leave_the_last_layer_out(layers, count, expected):
    assert tap_ids(layers, count) == expected


def test_training_resumes_exactly(target, tmp_path):
    data, held_out = responses(6), responses(2, seed=1)
    run = functools.partial(train_drafter, target=target, mask_token=MASK, data=data, held_out=held_out)
    whole, done = run(CONFIG, out=tmp_path)
    assert done
    shutil.rmtree(tmp_path / "checkpoints" / "6")  # as if killed after step 4
    resumed, _ = run(CONFIG, out=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(model) for model in (whole, resumed)))
