"""Text at the edges: characters cut by tokens, stop strings cut by pieces, prompts that cannot be used."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, processors

from dflash_jax.errors import InputError
from dflash_jax.text import StopFinder, TextStream, Tokenizer, Transcript, load_tokenizer


def byte_tokenizer() -> Tokenizer:
    return Tokenizer(byte_core(), Path("model"))


def byte_core() -> Core:
    """One token a byte (id = byte value), and a special token <end>, id 256: every character of two bytes is cut."""
    alphabet = {chr(b): b for b in range(33, 127)} | {chr(b): b for b in (*range(161, 173), *range(174, 256))}
    for n, b in enumerate(b for b in range(256) if b not in alphabet.values()):
        alphabet[chr(256 + n)] = b
    core = Core(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    return core


def fallback_core() -> Core:
    """A sentencepiece-like tokenizer: words with a leading ▁, bytes as <0xNN>."""
    vocab = [(f"<0x{b:02X}>", 0.0) for b in range(256)] + [("▁", -1.0), ("▁hi", -1.0), ("x", -1.0)]
    core = Core(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_core(), Path("model"))


@settings(deadline=None)
@given(st.text(min_size=1))
def test_text_comes_back_whole_and_no_piece_holds_half_a_character(text):
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert len(tokens) == len(text.encode())
    assert "".join(pieces) + stream.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte(tokenizer):
    stream = TextStream(tokenizer)
    assert [stream.push(b) for b in "aé😀".encode()] == ["a", "", "é", "", "", "", "😀"]


def test_invalid_bytes_do_not_hold_the_text_up(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.push(b) for b in [0xFF] * 5 + list(b"ok")]
    assert "".join(pieces) == "\ufffd" * 5 + "ok"


def test_an_unfinished_character_is_shown_at_the_end(tokenizer):
    assert tokenizer.decode("é".encode()[:1]) == "\ufffd"


def test_special_tokens_are_not_text(tokenizer):
    assert tokenizer.decode([*b"a", 256, *b"b"]) == "ab"


def test_byte_fallback_and_leading_spaces():
    tokenizer = Tokenizer(fallback_core(), Path("model"))
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in [257, 257, 256, *"é€".encode(), 258]]
    assert pieces == ["hi", " hi", " ", "", "é", "", "", "€", "x"]


def test_cost_of_a_token_does_not_grow_with_the_text(tokenizer):
    stream = TextStream(tokenizer)
    for token in b"x" * 1000:
        stream.push(token)
    assert len(stream._ids) < 5


@settings(deadline=None)
@given(
    st.text("abn", max_size=30),
    st.lists(st.text("abn", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=5),
)
def test_stop_strings_are_found_whatever_the_pieces(text, stops, cuts):
    """However the text is cut, what is shown is a start of the text, nothing of a stop string that was found."""
    finder, shown = StopFinder(stops), ""
    bounds = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    for start, end in itertools.pairwise(bounds):
        shown += finder.push(text[start:end])
        if finder.found:
            break
    shown += finder.flush()
    assert text.startswith(shown)
    assert (finder.found is not None) == any(stop in text for stop in stops)
    if finder.found:
        assert text.startswith(shown + finder.found)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == text


def test_stop_string_across_tokens_ends_the_tokens_too(tokenizer):
    transcript = Transcript(tokenizer, ["\n\n", "END"])
    assert transcript.push(list(b"one\n")) == ("one", 4)
    assert transcript.push(list(b"two E")) == ("\ntwo ", 5)
    assert transcript.push(list(b"N\n\nrest")) == ("EN", 3)
    assert transcript.stopped
    assert transcript.flush() == ""


def test_text_held_back_for_a_stop_string_comes_at_the_end(tokenizer):
    transcript = Transcript(tokenizer, "END")
    assert transcript.push(list(b"the EN")) == ("the ", 6)
    assert transcript.flush() == "EN"


@pytest.mark.parametrize("stops", [[""], [3]])
def test_stop_strings_are_checked(tokenizer, stops):
    with pytest.raises(InputError, match="at least one character"):
        Transcript(tokenizer, stops)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_empty_prompt(tokenizer, prompt):
    with pytest.raises(InputError, match="prompt is empty"):
        tokenizer.encode(prompt)


@pytest.mark.parametrize(("prompt", "bad"), [([3, 300], "300"), ([-1], "-1")])
def test_ids_outside_the_vocabulary(tokenizer, prompt, bad):
    with pytest.raises(InputError, match=f"token id {bad} .* 0 to 256") as error:
        tokenizer.encode(prompt)
    one_line(error)


def test_the_model_decides_what_the_vocabulary_is():
    assert Tokenizer(byte_core(), Path("model"), vocab_size=300).encode([299]) == [299]
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        Tokenizer(byte_core(), Path("model"), vocab_size=100).encode("~~")


@pytest.mark.parametrize("prompt", [[1.5], [True], ["a", "b"], [{"role": "user", "content": "a"}, 3]])
def test_prompts_of_other_kinds(tokenizer, prompt):
    with pytest.raises(InputError, match="text, token ids or chat messages"):
        tokenizer.encode(prompt)


def test_numpy_ids_are_ids(tokenizer):
    np = pytest.importorskip("numpy")
    tokens = tokenizer.encode(np.array([1, 2], np.int32))
    assert tokens == [1, 2]
    assert all(type(token) is int for token in tokens)


def test_chat_messages_need_a_template(tmp_path):
    byte_core().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(tmp_path).encode([{"role": "user", "content": "hi"}])
    with pytest.raises(InputError, match="`role` and `content`"):
        load_tokenizer(tmp_path).encode([{"text": "hi"}])


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no\ntools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)


def test_chat_template_is_applied(tmp_path):
    byte_core().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert bytes(tokenizer.encode([{"role": "user", "content": "hi"}])).decode() == "<user>hi\n<model>"
    with pytest.raises(InputError, match="refuses these messages: no") as error:
        tokenizer.encode([{"role": "tool", "content": "hi"}])
    one_line(error)


def test_a_chat_gets_its_special_tokens_once(tmp_path):
    """The tokenizer puts one before a plain text; a template has written its own."""
    core = byte_core()
    core.post_processor = processors.TemplateProcessing("<end> $A", special_tokens=[("<end>", 256)])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "chat_template.jinja").write_text("<end>{{ messages[0].content }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [256, 97]
    assert tokenizer.encode([{"role": "user", "content": "a"}]) == [256, 97]


def test_folder_without_tokenizer_takes_ids_only(tmp_path):
    tokenizer = load_tokenizer(tmp_path, vocab_size=8)
    assert tokenizer.encode([1, 7]) == [1, 7]
    assert tokenizer.decode([1, 7]) == ""
    with pytest.raises(InputError, match="as token ids"):
        tokenizer.encode("hi")
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        Transcript(tokenizer, ["x"])


def test_broken_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer") as error:
        load_tokenizer(tmp_path)
    one_line(error)


def test_folder_with_vocabulary_files_only(tmp_path):
    """Older checkpoints have vocab.json and merges.txt; transformers turns them into a fast tokenizer."""
    byte_core().model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("né")) == "né"
