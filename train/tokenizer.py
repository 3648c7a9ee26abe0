"""The embedded pair's tokenizer: byte-level BPE whose pieces follow source code."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
MASK = "<|mask|>"
VOCAB_SIZE = 2048

# A line break keeps the indentation that follows it, so that both are one token and the next word has no leading space.
PIECES = r"[\r\n]+[ \t]*| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\s+?(?= ?\S)|\s+"


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Ids 0 and 1 are the end of a document and the drafter's mask; digits stay single tokens."""
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, mask_token=MASK, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers.AutoTokenizer reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)


def load_or_train(folder: Path, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, trained on `texts` first if it is not there."""
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(texts), folder)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A saved tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
