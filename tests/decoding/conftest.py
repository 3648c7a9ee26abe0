import pytest

from dflash_jax.decoding import prefill


@pytest.fixture(scope="module")
def small_chunks():
    """Prompt chunks of 8 rows: short prompts cross every boundary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "CHUNK", 8)
        patch.setattr(prefill, "SHORT", 4)
        yield


@pytest.fixture
def states(monkeypatch):
    """The state of the device after each dispatch, as `generate` goes on."""
    from dflash_jax.decoding import run

    seen, rounds_for = [], run.rounds_for

    def recorded(graph, weights, state, *arguments):
        seen.append(rounds_for(len(state.finished))(graph, weights, state, *arguments))
        # The next dispatch takes the arrays over.
        seen[:-1] = [None] * (len(seen) - 1)
        return seen[-1]

    monkeypatch.setattr(run, "rounds_for", lambda sequences: recorded)
    return seen
