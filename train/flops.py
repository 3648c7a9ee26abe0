"""How much arithmetic a training step needs, counted from the weights: the numerator of the model flops utilisation.

Only what the method asks for is counted: nothing that is made again to save memory, no padding, no masked scores beyond
half of a causal square.
"""

import math

from flax import nnx

from dflash_jax.config import DrafterConfig, TargetConfig

_TABLES = {"embed", "lm_head", "predecessor", "successor"}  # looked up, or counted apart


def _products(state: nnx.State, experts: float = 1.0) -> float:
    """Multiplications a token in the matrices of a model; `experts` is the share of the routed ones that are used."""
    total = 0.0
    for path, variable in nnx.to_flat_state(state):
        shape, names = variable.get_value().shape, set(map(str, path))
        if len(shape) >= 2 and not names & _TABLES:
            total += math.prod(shape) * (experts if "experts" in names else 1.0)
    return total


def target_flops(config: TargetConfig, state: nnx.State, length: int) -> float:
    """A token of the target's forward pass over rows of `length`, without the head, which taps do not need."""
    moe = config.moe
    flops = 2 * _products(state, moe.top_k / moe.num_experts if moe else 1.0)
    for kind in config.layer_types:
        if kind != "linear_attention":
            window = config.sliding_window if kind == "sliding_attention" and config.sliding_window else length
            flops += 4 * config.num_heads * config.head_dim * min(window, length / 2)
    return flops


def drafter_flops(
    config: DrafterConfig, state: nnx.State, *, tokens: int, anchors: int, length: int, vocab: int
) -> float:
    """A training step over `tokens` of context in rows of `length`, each with `anchors` blocks, backward included.

    The loss is over `vocab` tokens.

    The backward pass costs twice the forward, but the frozen head and the taps get no gradient of their own.
    """
    c = config
    rows = tokens / length * anchors * c.block_size
    keys = c.num_layers * 2 * c.num_kv_heads * c.head_dim * c.hidden_size  # made of the context too
    fuse = len(c.tap_ids) * c.hidden_size**2
    layers = _products(state) - fuse
    context = c.hidden_size * vocab * rows * (c.block_size - 1) / c.block_size
    scores = 0.0
    for kind in c.layer_types:
        window = c.sliding_window if kind == "sliding_attention" and c.sliding_window else length
        scores += 2 * c.num_heads * c.head_dim * (min(window, length / 2) + c.block_size)
    forward_and_two = 3 * (rows * (layers + scores) + tokens * keys)
    return 2 * (forward_and_two + 2 * (context + tokens * fuse))
