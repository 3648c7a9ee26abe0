"""The DFlash loop in plain PyTorch, the way published reference code is written: what this project is measured against.

Target and drafter are built from the modules of transformers, each with its DynamicCache; a Python loop over rounds.
One sequence, greedy. It reads the published drafter layout, DFlash and DFlash 2, and drafts and accepts what recorded
runs of the reference implementation did (tests/test_benchmarks.py).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    ALL_ATTENTION_FUNCTIONS,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)


@dataclasses.dataclass(frozen=True)
class Output:
    """Generated ids, and the number that each round committed, its bonus token included."""

    tokens: list[int]
    acceptance_lengths: list[int]


class DraftAttention(nn.Module):
    """Queries of the block; keys and values of the context since the last round, and of the block."""

    def __init__(self, config: Any, i: int) -> None:
        super().__init__()
        self.i, self.config, self.head_dim = i, config, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = False
        size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (Qwen3RMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, h: Tensor, context: Tensor, cos_sin: Any, mask: Any, cache: DynamicCache) -> Tensor:
        k = torch.cat([self.k_proj(context), self.k_proj(h)], 1).unflatten(-1, (-1, self.head_dim))
        v = torch.cat([self.v_proj(context), self.v_proj(h)], 1).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = self.q_norm(self.q_proj(h).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        cos, sin = cos_sin
        q, _ = apply_rotary_pos_emb(q, q, cos[:, -q.shape[2] :], sin[:, -q.shape[2] :])
        k, _ = apply_rotary_pos_emb(k, k, cos, sin)
        k, v = cache.update(k, v, self.i)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, q, k, v, mask, dropout=0.0, scaling=self.head_dim**-0.5)
        return self.o_proj(out.flatten(2))


class Convolution(nn.Module):
    """DFlash 2's pair of two-tap convolutions around a sub-layer, their kernels made from its input."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.base_kernel = nn.Parameter(torch.empty(2, 2, dim))  # [before or after, tap, D]
        self.kernel_projection = nn.Linear(dim, 4 * groups, bias=False)

    def forward(self, h: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        dynamic = self.kernel_projection(h).unflatten(-1, (2, 2, -1))
        repeats = self.base_kernel.shape[-1] // dynamic.shape[-1]
        kernels = self.base_kernel + dynamic.repeat_interleave(repeats, -1)  # [1, rows, 2, 2, D]
        return self._convolve(kernels[:, :, 1], sublayer(self._convolve(kernels[:, :, 0], h)))

    def _convolve(self, kernel: Tensor, x: Tensor) -> Tensor:
        return kernel[:, :, 0] * x + kernel[:, :, 1] * F.pad(x, (0, 0, 1, -1))


class DraftLayer(nn.Module):
    """Attention and MLP with their norms, and in DFlash 2 a convolution around each."""

    def __init__(self, config: Qwen3Config, i: int, groups: int) -> None:
        super().__init__()
        dim = config.hidden_size
        self.self_attn, self.mlp = DraftAttention(config, i), Qwen3MLP(config)
        self.input_layernorm, self.post_attention_layernorm = (Qwen3RMSNorm(dim, config.rms_norm_eps) for _ in "12")
        self.attention_conv, self.mlp_conv = (Convolution(dim, groups) if groups else None for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, cos_sin: Any, mask: Any, cache: DynamicCache) -> Tensor:
        def attend(h: Tensor) -> Tensor:
            return self.self_attn(h, context, cos_sin, mask, cache)

        h = self.input_layernorm(x)
        x = x + (self.attention_conv(h, attend) if self.attention_conv else attend(h))
        h = self.post_attention_layernorm(x)
        return x + (self.mlp_conv(h, self.mlp) if self.mlp_conv else self.mlp(h))


class Drafter(nn.Module):
    """A DFlash or DFlash 2 drafter: `draft` gives one block; keys and values of committed positions are kept."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        weights = load_file(folder / "model.safetensors")
        raw = json.loads((folder / "config.json").read_text())
        settings = raw["dflash_config"]
        config = Qwen3Config(**raw)
        config._attn_implementation = "sdpa"
        self.layer_types: list[str] = raw["layer_types"]
        self.window: int | None = raw["sliding_window"]
        self.block_size: int = raw["block_size"]
        self.taps: list[int] = settings["target_layer_ids"]
        self.mask_token: int = settings["mask_token_id"]
        self.selector_top_k: int = settings.get("selector_top_k", 0)
        kernels = weights.get("layers.0.mlp_conv.kernel_projection.weight")
        groups = 0 if kernels is None else len(kernels) // 4
        self.layers = nn.ModuleList(DraftLayer(config, i, groups) for i in range(len(self.layer_types)))
        self.fc = nn.Linear(len(self.taps) * config.hidden_size, config.hidden_size, bias=False)
        self.norm, self.hidden_norm = (Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        self.rotary = Qwen3RotaryEmbedding(config)
        self.selector = {name: weights.pop(name) for name in list(weights) if name.startswith("candidate_selector.")}
        self.load_state_dict(weights)
        self.eval().reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.cache = DynamicCache()

    def draft(self, features: Tensor, anchor: int, target: Any) -> list[int]:
        """block_size - 1 tokens after `anchor`; `features` [1, rows, taps*D]: taps of the rows committed since."""
        block = torch.tensor([[anchor] + [self.mask_token] * (self.block_size - 1)])
        context = self.hidden_norm(self.fc(features))
        x = target.get_input_embeddings()(block)
        start = self.cache.get_seq_length()
        committed = start + context.shape[1]
        cos_sin = self.rotary(x, torch.arange(start, committed + self.block_size)[None])
        masks = self._masks(committed)
        for layer, kind in zip(self.layers, self.layer_types, strict=True):
            x = layer(x, context, cos_sin, masks[kind], self.cache)
        self.cache.crop(-self.block_size)
        hidden = self.norm(x)[:, 1:]
        logits = target.get_output_embeddings()(hidden)
        if self.selector_top_k:
            return self._select(hidden[0], logits[0], anchor)
        return logits[0].argmax(-1).tolist()

    def _masks(self, context: int) -> dict[str, Tensor | None]:
        """What the block's rows see of the context and of one another: sliding layers are causal in the block."""
        rows = torch.arange(context, context + self.block_size)[:, None]
        columns = torch.arange(context + self.block_size)[None]
        sliding = None if self.window is None else ((columns <= rows) & (columns > rows - self.window))[None, None]
        return {"full_attention": None, "sliding_attention": sliding}

    def _select(self, hidden: Tensor, logits: Tensor, anchor: int) -> list[int]:
        """DFlash 2's walk from the anchor through the best candidates of each row."""
        w = {name.split(".")[1]: weight for name, weight in self.selector.items()}
        scores, candidates = logits.topk(self.selector_top_k, -1)
        states = F.linear(hidden, w["hidden_projection"])
        tokens, previous = [], anchor
        for row in range(len(candidates)):
            key = w["predecessor_codebook"][previous] * states[row]
            best = (scores[row] + w["successor_codebook"][candidates[row]] @ key).argmax()
            previous = int(candidates[row, best])
            tokens.append(previous)
        return tokens


class Reference:
    """A target of transformers and a drafter, loaded from their folders in float32."""

    def __init__(self, target: Path, drafter: Path) -> None:
        self.target: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.drafter = Drafter(drafter)

    @torch.inference_mode()
    def generate(self, prompt: list[int], max_new_tokens: int) -> Output:
        """Greedy speculative decoding of one sequence. The end-of-sequence token is not looked for."""
        cache, drafter = DynamicCache(config=self.target.config), self.drafter
        drafter.reset()
        tokens = list(prompt)
        logits, features = self._forward(tokens, cache)
        tokens.append(int(logits[-1].argmax()))
        lengths = []
        while len(tokens) < len(prompt) + max_new_tokens:
            drafted = drafter.draft(features, tokens[-1], self.target)
            logits, features = self._forward([tokens[-1], *drafted], cache)
            chosen = logits.argmax(-1)
            accepted = int((chosen[:-1] == torch.tensor(drafted)).cumprod(0).sum())
            tokens += [*drafted[:accepted], int(chosen[accepted])]
            lengths.append(accepted + 1)
            if rejected := len(drafted) - accepted:
                cache.crop(-rejected)
            features = features[:, : accepted + 1]  # of the anchor and the accepted rows
        return Output(tokens[len(prompt) :][:max_new_tokens], lengths)

    def _forward(self, tokens: list[int], cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """(logits [rows, V], taps [1, rows, taps*D]) of new rows."""
        out = self.target(
            torch.tensor([tokens]), past_key_values=cache, use_cache=True, output_hidden_states=True, return_dict=True
        )
        return out.logits[0], torch.cat([out.hidden_states[tap + 1] for tap in self.drafter.taps], -1)
