"""Sizes of a new drafter for a given target."""

import dataclasses

from dflash_jax.config import DrafterConfig, LayerType, TargetConfig
from dflash_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class DrafterArchitecture:
    """Sizes of a drafter; it takes the target's width, vocabulary, rotation, embedding and head.

    Args:
        num_layers: draft layers
        block_size: rows of a block, the anchor included
        taps: how many of the target's layers are tapped, evenly spread
        tap_ids: which ones, instead
        sliding_window: positions that rows of sliding layers see; default: full attention everywhere
        sliding_layers: how many layers slide, the first ones; default: all, where there is a window
        causal: whether a block's rows see only those before them; default: in sliding layers
        attention_bias: biases of the attention's projections
        rms_norm_eps: default: the target's
        convolution: DFlash 2's grouped convolutions along the block
        selector_rank: rank of DFlash 2's candidate selector; 0 is none
        selector_top_k: candidates of a row
    """

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 48
    intermediate_size: int = 384
    block_size: int = 8
    taps: int = 3
    tap_ids: tuple[int, ...] | None = None
    sliding_window: int | None = None
    sliding_layers: int | None = None
    causal: bool | None = None
    attention_bias: bool = False
    rms_norm_eps: float | None = None
    convolution: bool = False
    selector_rank: int = 0
    selector_top_k: int = 16

    def drafter_config(self, target: TargetConfig, mask_token: int) -> DrafterConfig:
        kinds = self._layer_types()
        return DrafterConfig(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            layer_types=kinds,
            causal=tuple(kind == "sliding_attention" if self.causal is None else self.causal for kind in kinds),
            sliding_window=self.sliding_window if "sliding_attention" in kinds else None,
            rope=dataclasses.replace(target.rope, dim=self.head_dim),
            rms_norm_eps=self.rms_norm_eps or target.rms_norm_eps,
            attention_bias=self.attention_bias,
            block_size=self.block_size,
            mask_token_id=mask_token,
            tap_ids=self.tap_ids or tap_ids(target.num_layers, self.taps),
            num_target_layers=target.num_layers,
            max_position=target.max_position,
            conv_kernel_size=2 if self.convolution else 0,
            selector_rank=self.selector_rank,
            selector_top_k=self.selector_top_k,
        )

    def _layer_types(self) -> tuple[LayerType, ...]:
        if self.sliding_window is None:
            if self.sliding_layers:
                raise InputError(f"sliding_layers is {self.sliding_layers} without a window; give sliding_window too")
            return ("full_attention",) * self.num_layers
        sliding = self.num_layers if self.sliding_layers is None else self.sliding_layers
        if not 0 <= sliding <= self.num_layers:
            raise InputError(f"sliding_layers is {sliding}; give 0 to {self.num_layers}, the drafter's num_layers")
        return ("sliding_attention",) * sliding + ("full_attention",) * (self.num_layers - sliding)


def tap_ids(layers: int, count: int) -> tuple[int, ...]:
    """The layers to tap: spread evenly, never the last one."""
    if count == 1:
        return (layers // 2,)
    return tuple(round(1 + i * (layers - 4) / (count - 1)) for i in range(count))
