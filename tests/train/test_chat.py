import numpy as np
import pytest

from dflash_jax.errors import InputError
from dflash_jax.text import load_tokenizer
from tests.train import runs
from train.chat import conversation, prompt_ids

END = 0
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes \u00e9"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "no"},
]
# Drops the thoughts of all replies but the last, and has an option, as templates of reasoning models do.
THOUGHTS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "[{{ m['thoughts'] }}]{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% if quiet %}[]{% endif %}{% endif %}"
)


def tokenizer(folder, template=runs.TEMPLATE):
    runs.tokenizer(template).save_pretrained(folder)
    return load_tokenizer(folder)


def replies(made, tokens, mask) -> str:
    return made.core.decode(tokens[mask].tolist(), skip_special_tokens=False)


def test_the_mask_is_on_the_replies_up_to_their_end_tokens(tmp_path):
    made = tokenizer(tmp_path)
    tokens, mask = conversation(made, TALK, [END], {})
    assert made.core.decode(tokens.tolist(), skip_special_tokens=False) == made.render(TALK, ask=False)
    assert replies(made, tokens, mask) == "yes \u00e9<|end|>no<|end|>"
    assert tokens.dtype == np.int32 and mask.dtype == bool


def test_a_conversation_begins_as_the_prompt_that_the_target_gets(tmp_path):
    made = tokenizer(tmp_path)
    tokens, mask = conversation(made, TALK[:2], [END], {})
    prompt = made.encode(TALK[:1])
    assert tokens[: len(prompt)].tolist() == prompt and int(np.argmax(mask)) == len(prompt)


def test_replies_that_the_template_changes_later_do_not_count(tmp_path):
    made = tokenizer(tmp_path, THOUGHTS)
    talk = [m | {"thoughts": "hm"} for m in TALK]
    tokens, mask = conversation(made, talk, [END], {})
    assert replies(made, tokens, mask) == "[hm]no<|end|>"
    quiet = [m | {"thoughts": ""} for m in TALK]
    assert replies(made, *conversation(made, quiet, [END], {"quiet": True})) == "no<|end|>"


def test_a_conversation_without_replies_has_an_empty_mask(tmp_path):
    assert not conversation(tokenizer(tmp_path), TALK[:1], [END], {})[1].any()


def test_prompts_of_every_kind(tmp_path):
    made = tokenizer(tmp_path)
    asked = made.encode(TALK[:3])
    for line in (TALK, {"messages": TALK}, {"prompt": TALK[:3]}):
        assert prompt_ids(made, line, {}) == asked
    for line in ("hi", {"prompt": "hi"}, {"text": "hi"}, [made.core.token_to_id("h"), made.core.token_to_id("i")]):
        assert prompt_ids(made, line, {}) == made.encode("hi")
    for line in ({}, [], [TALK[1]], 7, {"prompt": None}):
        with pytest.raises(InputError, match="give a text, chat messages that do not all come from the assistant"):
            prompt_ids(made, line, {})
