import pytest
from transformers import AutoTokenizer

from train import corpus
from train.tokenizer import END, MASK, load_or_train
from train.windows import pack

SNIPPETS = [
    "def f(a, b=1):\n    if a:\n        return b + 12\n\n\treturn None\n",
    "x  =  'd\u00e9j\u00e0 vu \U0001f642'   \n\n\n    # end",
    "\r\n \t mixed\r\n",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [document.text for document in corpus.split()[0][:30]]
    trained = load_or_train(folder, texts)
    assert load_or_train(folder, ()).get_vocab() == trained.get_vocab()  # read, not trained again
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", SNIPPETS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_the_first_ids_and_the_vocabulary_its_size(tokenizer):
    assert (tokenizer.eos_token, tokenizer.mask_token) == (END, MASK)
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id, len(tokenizer)) == (0, 1, 2048)


def test_digits_are_single_and_indentation_goes_with_its_line_break(tokenizer):
    pieces = [tokenizer.decode([token]) for token in tokenizer("x = 2048\n        y")["input_ids"]]
    assert [piece.strip() for piece in pieces if piece.strip().isdigit()] == list("2048")
    assert "\n        " in pieces


def test_packed_documents_end_with_the_end_token(tokenizer):
    packed = pack(tokenizer, ["a = 1\n", "b = 2\n"])
    assert (packed == 0).sum() == 2 and packed[-1] == 0
