"""Tiny random models of every supported family, made by transformers: what ours are compared with."""

import math
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the default is up to 250 times slower for models this small

import torch
import transformers

VOCAB = 67
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "eos_token_id": 3,
}
_DENSE = _COMMON | {"num_hidden_layers": 3, "intermediate_size": 56}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
_HYBRID = _COMMON | {
    "num_hidden_layers": 5,  # four gated delta or attention layers in the published rhythm, and one more
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}
_WINDOWED = {"use_sliding_window": True, "sliding_window": 5}

# Name of the case: the class, and its configuration. Every option that changes the computation is on in one of them.
CASES = {
    "llama": ("Llama", _DENSE | {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3}),
    "llama_tied": (
        "Llama",
        _DENSE
        | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "qwen2": ("Qwen2", _DENSE | {"head_dim": 10} | _WINDOWED | {"max_window_layers": 1}),
    "qwen3": ("Qwen3", _DENSE | {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "qwen3_windowed": ("Qwen3", _DENSE | _WINDOWED | {"max_window_layers": 2, "rope_parameters": _YARN}),
    "qwen3_moe": ("Qwen3Moe", _DENSE | _EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe_sparse": (
        "Qwen3Moe",
        _DENSE | _EXPERTS | _WINDOWED | {"norm_topk_prob": False, "decoder_sparse_step": 2},
    ),
    "qwen3_next": (
        "Qwen3Next",
        _HYBRID | _EXPERTS | {"intermediate_size": 56, "shared_expert_intermediate_size": 20, "mlp_only_layers": [2]},
    ),
    "qwen3_5": ("Qwen3_5", _HYBRID | {"intermediate_size": 56, "tie_word_embeddings": True}),
    "qwen3_5_moe": ("Qwen3_5Moe", _HYBRID | _EXPERTS | {"shared_expert_intermediate_size": 20}),
    "gpt_oss": (
        "GptOss",
        _COMMON
        | {
            "num_hidden_layers": 3,
            "intermediate_size": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
        }
        | {"rope_parameters": _YARN | {"truncate": False}, "swiglu_limit": 1.0},
    ),
}


def make(case: str, seed: int = 0) -> torch.nn.Module:
    """The model of a case, with every parameter random: norms, biases, sinks, decay rates too."""
    name, options = CASES[case]
    text = "TextConfig" if name.startswith("Qwen3_5") else "Config"
    config = getattr(transformers, name + text)(**options)
    if case == "qwen2":
        assert config.hidden_size // config.num_attention_heads == options["head_dim"]
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):
            parameter.data = 0.5 * noise
        elif parameter.ndim == 1:  # norms stay near what they were, biases and sinks leave zero
            parameter.data = parameter.data + 0.3 * noise
        else:
            parameter.data = (
                (1.0 if "embed" in name or "conv1d" in name else 0.6) * noise / math.sqrt(parameter.shape[-1])
            )


def save(case: str, folder: Path, seed: int = 0, **options: object) -> torch.nn.Module:
    model = make(case, seed)
    model.save_pretrained(folder, **options)
    return model


@torch.no_grad()
def outputs(model: torch.nn.Module, tokens) -> tuple:
    """Logits [B, T, V] and the residual stream after each layer [L, B, T, D], the last one after the final norm."""
    out = model(torch.as_tensor(tokens, dtype=torch.long), output_hidden_states=True)
    return out.logits.numpy(), torch.stack(out.hidden_states[1:]).numpy()


def load(folder: Path) -> torch.nn.Module:
    """The folder through transformers; every weight must be used and given."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], (problem, info[problem])
    return model.eval()
