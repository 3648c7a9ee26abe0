"""Plain rounds leave taps behind; what the drafter proposes after them is what it proposes after a prefill."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.cache import Backlog
from dflash_jax.decoding.generate import generate
from dflash_jax.decoding.observe import BACKLOG
from dflash_jax.decoding.width import MOST_ROUNDS, Pace
from tests.decoding import pairs

LENGTHS, NEW = [5, 19], 90


class PlainFirst(Pace):
    """A pace with so many plain rounds, and only wide ones after them."""

    def __init__(self, plain, block):
        super().__init__([1, block])
        self.left, self.block = plain, block

    def next(self, load, texts):
        if not self.left:
            return self.block, MOST_ROUNDS
        rounds = min(self.left, MOST_ROUNDS)
        self.left -= rounds
        return 1, rounds


@pytest.mark.parametrize("plain", [5, BACKLOG, BACKLOG + 20])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss", "qwen3"])
def test_drafts_after_plain_rounds_are_those_after_a_prefill(family, plain):
    pair, prompts = pairs.pair(family), pairs.prompts(LENGTHS, seed=5)
    paced = replace(pair)
    vars(paced)["pace"] = PlainFirst(plain, pair.drafter.config.block_size)
    found = generate(paced, prompts, max_new_tokens=NEW, width="adaptive")
    # The prefill's own token is then the anchor of the first wide round.
    begun = [[*prompt, *one.tokens[:plain]] for prompt, one in zip(prompts, found, strict=True)]
    expected = generate(pair, begun, max_new_tokens=NEW - plain)
    assert [one.tokens[plain:] for one in found] == [rest.tokens for rest in expected]
    assert [one.acceptance_lengths[:plain] for one in found] == [[1] * plain] * len(prompts)
    lengths = [one.acceptance_lengths[plain:] for one in found]
    assert lengths == [rest.acceptance_lengths for rest in expected]
    assert sum(map(sum, lengths)) > 1.1 * sum(map(len, lengths))


def test_a_backlog_takes_rows_of_those_that_run():
    backlog = Backlog(jnp.zeros((3, 2, 4)), jnp.array([0, 1, 2]))
    rows = jnp.arange(1.0, 4.0)[:, None, None] * jnp.ones((3, 1, 4))
    made = backlog.add(rows, jnp.array([1, 1, 0]))
    assert made.count.tolist() == [1, 2, 2]
    assert np.asarray(made.taps)[:, :, 0].tolist() == [[1, 0], [0, 2], [0, 0]]
