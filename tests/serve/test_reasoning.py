"""Thoughts are told apart from the answer however the text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.reasoning import Thoughts


def parse(opened: bool, *pieces: str) -> tuple[str, str]:
    thoughts = Thoughts(opened)
    found = [*(thoughts.push(piece) for piece in pieces), thoughts.flush()]
    return "".join(thought for thought, _ in found), "".join(said for _, said in found)


@pytest.mark.parametrize(
    ("opened", "text", "expected"),
    [
        (False, "<think>\nWell,  a < b.\n\n</think>\n\nYes. ", ("Well,  a < b.", "Yes. ")),
        (True, "Well.\n</think>\n\nYes.", ("Well.", "Yes.")),
        (False, " \n<think>\n\n</think>\n\nYes.", ("", "Yes.")),
        (False, "Yes. <think>no</think>", ("", "Yes. <think>no</think>")),
        (False, "\n Yes", ("", "\n Yes")),
        (False, "<thin", ("", "<thin")),
        (True, "never ends </thin ", ("never ends </thin", "")),
        (False, "<think>a</think>b</think><think>", ("a", "b</think><think>")),
        (True, "a</think>", ("a", "")),
        (False, "", ("", "")),
        (False, " ", ("", " ")),
    ],
)
def test_thoughts_and_answers(opened, text, expected):
    assert parse(opened, text) == expected
    assert parse(opened, *text) == expected


def test_nothing_waits_for_the_end():
    thoughts = Thoughts(opened=False)
    assert [thoughts.push(piece) for piece in ("<think>\nSo ", "it <", "b> is</", "think>", "\n", "Yes", " <")] == [
        ("So", ""), (" it", ""), (" <b> is", ""), ("", ""), ("", ""), ("", "Yes"), ("", " <"),
    ]  # fmt: skip


@given(
    parts=st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", " <", "</", "é"]), max_size=7),
    opened=st.booleans(),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_cutting_changes_nothing(parts, opened, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(opened, *pieces) == parse(opened, text)
