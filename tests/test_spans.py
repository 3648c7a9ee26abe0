"""Text keeps the colour of its token, however late it is shown."""

from pathlib import Path
from types import SimpleNamespace

from dflash_jax.spans import Spans
from dflash_jax.text import Tokenizer
from tests.test_text import fallback_core


def test_colours_follow_tokens_whose_text_comes_in_parts():
    """The end of a token's text may be held back, as the possible start of a stop string; it keeps its colour."""
    spans = Spans(Tokenizer(fallback_core(), Path("model")))
    first = SimpleNamespace(text="h", tokens=[257], drafted=[True])  # "hi"
    second = SimpleNamespace(text="ix", tokens=[258], drafted=[False])  # "x"
    assert list(spans.split(first)) == [("h", True)]
    assert list(spans.split(second)) == [("i", True), ("x", False)]
