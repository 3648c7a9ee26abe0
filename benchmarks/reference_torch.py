"""The DFlash loop in plain PyTorch, the way published reference code is written: what this project is measured against.

A target of transformers with its DynamicCache, a drafter that keeps its own keys and values, a Python loop over rounds.
One sequence, greedy. It reads the published drafter layout, DFlash and DFlash 2, and drafts and accepts what recorded
runs of the reference implementation did (tests/test_benchmarks.py).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb


@dataclasses.dataclass(frozen=True)
class Output:
    """Generated ids, and the number that each round committed, its bonus token included."""

    tokens: list[int]
    acceptance_lengths: list[int]


class Drafter:
    """A DFlash or DFlash 2 drafter: `draft` gives one block; keys and values of committed positions are kept."""

    def __init__(self, folder: Path) -> None:
        self.weights = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        settings = config["dflash_config"]
        self.layer_types: list[str] = config["layer_types"]
        self.window: int | None = config["sliding_window"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.block_size: int = config["block_size"]
        self.taps: list[int] = settings["target_layer_ids"]
        self.mask_token: int = settings["mask_token_id"]
        self.selector_top_k: int = settings.get("selector_top_k", 0)
        self.rotary = Qwen3RotaryEmbedding(Qwen3Config(**config))
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        empty = torch.zeros(1, self.kv_heads, 0, self.head_dim)
        self.cache = [(empty, empty) for _ in self.layer_types]

    def draft(self, features: torch.Tensor, anchor: int, target: Any) -> list[int]:
        """block_size - 1 tokens after `anchor`; `features` [1, rows, taps*D]: taps of the rows committed since."""
        block = torch.tensor([[anchor] + [self.mask_token] * (self.block_size - 1)])
        context = self._norm(F.linear(features, self.weights["fc.weight"]), "hidden_norm")
        x = target.get_input_embeddings()(block)
        start = self.cache[0][0].shape[2]
        end = start + context.shape[1] + self.block_size
        cos_sin = self.rotary(x, torch.arange(start, end)[None])
        masks = self._masks(start + context.shape[1])
        for i, kind in enumerate(self.layer_types):
            x = self._layer(i, x, context, cos_sin, masks[kind])
        hidden = self._norm(x, "norm")[:, 1:]
        logits = target.get_output_embeddings()(hidden)
        if self.selector_top_k:
            return self._select(hidden[0], logits[0], anchor)
        return logits[0].argmax(-1).tolist()

    def _masks(self, context: int) -> dict[str, torch.Tensor | None]:
        """What the block's rows see of the context and of one another: sliding layers are causal in the block."""
        rows = torch.arange(context, context + self.block_size)[:, None]
        columns = torch.arange(context + self.block_size)[None]
        sliding = None if self.window is None else (columns <= rows) & (columns > rows - self.window)
        return {"full_attention": None, "sliding_attention": sliding}

    def _layer(self, i: int, x: torch.Tensor, context: torch.Tensor, cos_sin: Any, mask: Any) -> torch.Tensor:
        h = self._norm(x, f"layers.{i}.input_layernorm")
        before, after = self._convolutions(f"layers.{i}.attention_conv", h)
        x = x + after(self._attention(i, before(h), context, cos_sin, mask))
        h = self._norm(x, f"layers.{i}.post_attention_layernorm")
        before, after = self._convolutions(f"layers.{i}.mlp_conv", h)
        return x + after(self._mlp(f"layers.{i}.mlp", before(h)))

    def _attention(self, i: int, h: torch.Tensor, context: torch.Tensor, cos_sin: Any, mask: Any) -> torch.Tensor:
        name = f"layers.{i}.self_attn"
        rows = torch.cat([context, h], 1)
        q = self._norm(self._heads(h, f"{name}.q_proj", self.heads), f"{name}.q_norm")
        k = self._norm(self._heads(rows, f"{name}.k_proj", self.kv_heads), f"{name}.k_norm")
        v = self._heads(rows, f"{name}.v_proj", self.kv_heads)
        cos, sin = cos_sin
        q, _ = apply_rotary_pos_emb(q, q, cos[:, -q.shape[2] :], sin[:, -q.shape[2] :])
        k, _ = apply_rotary_pos_emb(k, k, cos, sin)
        keys, values = torch.cat([self.cache[i][0], k], 2), torch.cat([self.cache[i][1], v], 2)
        kept = keys.shape[2] - self.block_size
        self.cache[i] = keys[:, :, :kept], values[:, :, :kept]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return F.linear(out.transpose(1, 2).flatten(2), self.weights[f"{name}.o_proj.weight"])

    def _heads(self, x: torch.Tensor, name: str, heads: int) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"]).unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        w = self.weights
        gate, up = F.linear(x, w[f"{name}.gate_proj.weight"]), F.linear(x, w[f"{name}.up_proj.weight"])
        return F.linear(F.silu(gate) * up, w[f"{name}.down_proj.weight"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _convolutions(self, name: str, h: torch.Tensor) -> Any:
        """DFlash 2's two convolutions around a sub-layer; the identity, twice, in a DFlash drafter."""
        if f"{name}.base_kernel" not in self.weights:
            return (lambda x: x), (lambda x: x)
        base = self.weights[f"{name}.base_kernel"]  # [before or after, tap, D]
        dynamic = F.linear(h, self.weights[f"{name}.kernel_projection.weight"]).unflatten(-1, (2, 2, -1))
        kernels = base + dynamic.repeat_interleave(base.shape[-1] // dynamic.shape[-1], -1)  # [1, rows, 2, 2, D]

        def convolution(which: int) -> Any:
            return lambda x: kernels[:, :, which, 0] * x + kernels[:, :, which, 1] * F.pad(x, (0, 0, 1, -1))

        return convolution(0), convolution(1)

    def _select(self, hidden: torch.Tensor, logits: torch.Tensor, anchor: int) -> list[int]:
        """DFlash 2's walk from the anchor through the best candidates of each row."""
        w = {
            name.split(".")[1]: value for name, value in self.weights.items() if name.startswith("candidate_selector.")
        }
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

    def _forward(self, tokens: list[int], cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [rows, V], taps [1, rows, taps*D]) of new rows."""
        out = self.target(
            torch.tensor([tokens]), past_key_values=cache, use_cache=True, output_hidden_states=True, return_dict=True
        )
        return out.logits[0], torch.cat([out.hidden_states[tap + 1] for tap in self.drafter.taps], -1)
