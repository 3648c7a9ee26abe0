import json

import numpy as np
import pytest

from dflash_jax.errors import InputError
from train.data import Corpus, batched, packed, require_learnable, split, whole_batches
from train.records import JsonLines

LENGTH = 32


class Numbers:
    """Documents whose tokens say which one it is: document i holds 100 i, 100 i + 1, ..."""

    def __init__(self, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.sizes = rng.integers(4, 20, count)
        self.prompts = rng.integers(1, 3, count)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        places = np.arange(self.sizes[index])
        return {"tokens": (100 * (index + 1) + places).astype(np.int32), "mask": places >= self.prompts[index]}


def stream(documents, seed: int, threads: int = 0):
    return iter(batched(packed(documents, length=LENGTH, bins=4, seed=seed, threads=threads), 2))


def documents_of(batch: dict[str, np.ndarray]) -> list[int]:
    """The documents in a batch, each as often as it comes, after a check that it is whole and alone in its segment."""
    source, found = Numbers(23), []
    rows = zip(*(batch[name] for name in ("tokens", "segments", "mask", "document")), strict=True)
    for tokens, segments, mask, document in rows:
        assert list(np.unique(segments[segments > 0])) == list(range(1, segments.max() + 1))
        assert not mask[segments == 0].any() and not tokens[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            index = int(document[here][0])
            assert np.all(document[here] == index)
            np.testing.assert_array_equal(tokens[here], source[index]["tokens"])
            np.testing.assert_array_equal(mask[here], source[index]["mask"])
            found.append(index)
    return found


def test_rows_hold_whole_documents_and_every_one_comes_once_an_epoch():
    batches, counts = stream(Numbers(23), seed=3), np.zeros(23, int)
    orders = [documents_of(next(batches)) for _ in range(60)]
    order = [index for part in orders for index in part]
    np.add.at(counts, order, 1)
    assert counts.max() - counts.min() <= 1 + 8 // 4  # documents wait in open rows at the end
    assert order[:23] != order[23:46]


def test_the_order_is_the_seed_s_alone():
    def first(seed: int, threads: int) -> list[list[int]]:
        batches = stream(Numbers(23), seed, threads)
        return [documents_of(next(batches)) for _ in range(5)]

    assert first(3, 0) == first(3, 2) != first(4, 0)


@pytest.mark.parametrize("stop", [0, 1, 5, 12])
def test_a_pipeline_goes_on_exactly_where_its_state_says(stop):
    whole = stream(Numbers(23), seed=3, threads=2)
    for _ in range(stop):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))  # as a checkpoint keeps it
    wanted = [next(whole) for _ in range(9)]
    again = stream(Numbers(23), seed=3, threads=2)
    next(again)
    again.set_state(state)
    for batch in wanted:
        for name, x in next(again).items():
            np.testing.assert_array_equal(x, batch[name])


def test_held_out_rows_come_in_order_and_the_last_batch_is_filled_with_padding():
    batches = whole_batches(Numbers(23), length=LENGTH, size=4)
    assert [index for batch in batches for index in sorted(documents_of(batch))] != []
    assert sorted(index for batch in batches for index in documents_of(batch)) == list(range(23))
    assert all(batch["tokens"].shape == (4, LENGTH) for batch in batches)


def test_the_split_is_apart_and_the_seed_s():
    documents = Numbers(23)
    learned, held_out = split(documents, 2, seed=0)
    indices = [*learned.indices, *held_out.indices]
    assert sorted(indices) == list(range(23)) and len(held_out) == 2
    assert list(split(documents, 2, seed=1)[1].indices) != list(held_out.indices)
    np.testing.assert_array_equal(held_out[1]["tokens"], documents[int(held_out.indices[1])]["tokens"])


def test_documents_without_a_response_are_left_out_and_refused_where_there_are_no_others():
    class Silent(Numbers):
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            example = super().__getitem__(index)
            return example if index == 7 else example | {"mask": np.zeros_like(example["mask"])}

    batch = next(stream(Silent(23), seed=0))
    assert set(batch["document"][batch["segments"] > 0]) == {7}
    require_learnable(Silent(23))
    with pytest.raises(InputError, match="none of 7 documents has a response of two tokens"):
        require_learnable(Silent(7))


def lines(path, *objects) -> JsonLines:
    path.write_text("".join(f"{json.dumps(x)}\n\n" for x in objects))
    return JsonLines([path])


def test_responses_are_read_as_they_were_written_and_cut(tmp_path):
    corpus = Corpus(lines(tmp_path / "a.jsonl", {"tokens": [5, 6, 7, 8, 9], "prompt": 2, "id": 0}), length=4)
    np.testing.assert_array_equal(corpus[0]["tokens"], [5, 6, 7, 8])
    np.testing.assert_array_equal(corpus[0]["mask"], [False, False, True, True])


@pytest.mark.parametrize("line", [{"tokens": [1]}, {"text": "a"}, [1, 2], {"messages": []}])
def test_other_lines_are_refused_by_their_number(tmp_path, line):
    with pytest.raises(InputError, match=r"record 0 is .*; give objects with `tokens` and `prompt`, or with chat"):
        Corpus(lines(tmp_path / "a.jsonl", line), length=4)[0]


def test_lines_that_are_no_json_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2\n')
    read = JsonLines([tmp_path])
    assert len(read) == 2 and read[0] == {"a": 1}
    with pytest.raises(InputError, match=r"a.jsonl, line 2, is not JSON"):
        read[1]
    with pytest.raises(InputError, match="nowhere does not exist"):
        JsonLines([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"there are no .jsonl files in"):
        JsonLines([tmp_path / "empty"])


def test_files_are_read_in_their_order_without_a_last_line_break(tmp_path):
    (tmp_path / "b.jsonl").write_text("3\n4")
    (tmp_path / "a.jsonl").write_text("1\n2\n")
    (tmp_path / "c.jsonl").write_text("")
    read = JsonLines([tmp_path])
    assert [read[i] for i in range(len(read))] == [1, 2, 3, 4]
