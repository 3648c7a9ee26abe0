"""A target that takes part in whole runs: on disk, with a tokenizer and a chat template."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dflash_jax.checkpoints import save_target
from dflash_jax.models.target import Target
from tests import weights
from tests.train import tiny

END, MASK, START = "<|end|>", "<|mask|>", "<|start|>"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Bytes as tokens, after the three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([END, MASK, START, *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([END, MASK, START])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, mask_token=MASK)
    made.chat_template = template
    return made


def target_folder(folder: Path) -> Path:
    """A target whose favourite tokens depend on the context, so that a drafter has something to learn."""
    made = tokenizer()
    config = tiny.TARGET.target_config(len(made), made.eos_token_id)
    save_target(weights.noisy(lambda: Target(config, rngs=nnx.Rngs(1))), folder, jnp.float32)
    made.save_pretrained(folder)
    return folder


def prompts_file(path: Path, count: int, seed: int = 0) -> Path:
    """Texts and chat messages in turn."""
    rng = np.random.default_rng(seed)
    words = ["red", "green", "blue", "one", "two", "three"]
    texts = [" ".join(rng.choice(words, 4)) for _ in range(count)]
    lines = [
        {"prompt": text} if i % 2 else {"messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_file(path: Path, target: Path, prompts: Path, out: Path) -> Path:
    """A whole run, in seconds."""
    values = {
        "target": str(target),
        "out": str(out),
        "data": {"prompts": [str(prompts)], "length": 96, "bins": 4, "held_out_count": 4, "threads": 1},
        "regenerate": {"longest": 60, "response": 24, "batch": 8, "sampled": 0.5},
        "training": {
            "batch": 4,
            "anchors": 6,
            "architecture": {
                "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 16,
                "block_size": 4, "taps": 2,
            },
            "loop": {"steps": 12, "save_every": 4, "evaluate_every": 4, "log_every": 1},
            "decode": {"prompts": 2, "tokens": 12},
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path
