"""The name tables of the targets: shared pieces, put together by what the configuration says."""

from collections.abc import Callable

import numpy as np

from dflash_jax.checkpoints.table import Leaf, Piece, dense_mlp, projection, whole
from dflash_jax.config import MoeConfig, TargetConfig

# Where the text model stands in a checkpoint: bare, a causal language model, inside a vision-language wrapper.
PREFIXES = ("model.language_model.", "model.", "language_model.model.", "")
FUSED_EXPERTS = ("qwen3_5_moe",)  # published with one tensor for all experts of a layer, the others with one an expert


def target_table(config: TargetConfig) -> list[Leaf]:
    """Every leaf of `models.target.Target`; keys are without the prefix, except the head's."""
    dim = config.hidden_size
    leaves = [whole("embed/embedding", "embed_tokens.weight", (config.vocab_size, dim))]
    for i, kind in enumerate(config.layer_types):
        path, key = f"layers/{i}", f"layers.{i}"
        leaves += [
            whole(f"{path}/input_norm/weight", f"{key}.input_layernorm.weight", (dim,)),
            whole(f"{path}/post_norm/weight", f"{key}.post_attention_layernorm.weight", (dim,)),
        ]
        leaves += _gated_delta(config, path, key) if kind == "linear_attention" else _attention(config, path, key)
        leaves += _mlp(config, i, path, key)
    leaves.append(whole("norm/weight", "norm.weight", (dim,)))
    return leaves if config.tie_word_embeddings else leaves + projection("lm_head", "lm_head", dim, config.vocab_size)


def _attention(c: TargetConfig, path: str, key: str) -> list[Leaf]:
    path, key = f"{path}/mixer", f"{key}.self_attn"
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    columns = queries * 2 if c.gated_attention else queries  # gated: each head's query, then its gate
    leaves = [
        *projection(f"{path}/q_proj", f"{key}.q_proj", c.hidden_size, columns, c.qkv_bias),
        *projection(f"{path}/k_proj", f"{key}.k_proj", c.hidden_size, keys, c.qkv_bias),
        *projection(f"{path}/v_proj", f"{key}.v_proj", c.hidden_size, keys, c.qkv_bias),
        *projection(f"{path}/o_proj", f"{key}.o_proj", queries, c.hidden_size, c.o_bias),
    ]
    if c.qk_norm:
        leaves += [whole(f"{path}/{n}/weight", f"{key}.{n}.weight", (c.head_dim,)) for n in ("q_norm", "k_norm")]
    return leaves + ([whole(f"{path}/sinks", f"{key}.sinks", (c.num_heads,))] if c.sinks else [])


def _gated_delta(c: TargetConfig, path: str, key: str) -> list[Leaf]:
    delta, path, key = c.gated_delta, f"{path}/mixer", f"{key}.linear_attn"
    assert delta is not None
    values = delta.num_v_heads * delta.v_head_dim
    return [
        _in_proj(c, f"{path}/in_proj/kernel", key),
        _conv(c, f"{path}/conv", f"{key}.conv1d.weight"),
        whole(f"{path}/A_log", f"{key}.A_log", (delta.num_v_heads,), wide=True),
        whole(f"{path}/dt_bias", f"{key}.dt_bias", (delta.num_v_heads,), wide=True),
        whole(f"{path}/norm/weight", f"{key}.norm.weight", (delta.v_head_dim,)),
        *projection(f"{path}/out_proj", f"{key}.out_proj", values, c.hidden_size),
    ]


def _in_proj(c: TargetConfig, path: str, key: str) -> Leaf:
    """Columns here are q, k, v, z, b, a key head by key head. qwen3_next groups its rows so too; qwen3_5 does not."""
    delta, dim = c.gated_delta, c.hidden_size
    assert delta is not None
    heads, Dk, ratio = delta.num_k_heads, delta.k_head_dim, delta.num_v_heads // delta.num_k_heads
    Dv = ratio * delta.v_head_dim
    edges = {"q": (0, Dk), "k": (Dk, 2 * Dk), "v": (2 * Dk, 2 * Dk + Dv), "z": (2 * Dk + Dv, 2 * Dk + 2 * Dv)}
    edges |= {"b": (edges["z"][1], edges["z"][1] + ratio), "a": (edges["z"][1] + ratio, edges["z"][1] + 2 * ratio)}

    def piece(name: str, *groups: str) -> Piece:
        """Each group is a run of columns: the rows of all heads' first group come first, then those of the second."""
        spans = [(edges[group[0]][0], edges[group[-1]][1]) for group in groups]
        rows = heads * sum(stop - start for start, stop in spans)

        def views(leaf):
            grouped = leaf.reshape(dim, heads, -1)
            return [grouped[:, :, start:stop].transpose(1, 2, 0) for start, stop in spans]

        return Piece(f"{key}.{name}.weight", (rows, dim), views)

    if c.family == "qwen3_next":
        return Leaf(path, ((piece("in_proj_qkvz", "qkvz"), piece("in_proj_ba", "ba")),))
    flat = (
        piece("in_proj_qkv", "q", "k", "v"),
        piece("in_proj_z", "z"),
        piece("in_proj_b", "b"),
        piece("in_proj_a", "a"),
    )
    return Leaf(path, (flat,))


def _conv(c: TargetConfig, path: str, key: str) -> Leaf:
    """Channels of all heads' q, then k, then v in checkpoints; head by head here."""
    delta = c.gated_delta
    assert delta is not None
    Dk, taps = delta.k_head_dim, delta.conv_kernel
    channels = 2 * delta.num_k_heads * Dk + delta.num_v_heads * delta.v_head_dim
    runs = (slice(0, Dk), slice(Dk, 2 * Dk), slice(2 * Dk, None))
    return Leaf(
        path, ((Piece(key, (channels, 1, taps), lambda leaf: [leaf[:, :, run].transpose(1, 2, 0) for run in runs]),),)
    )


def _mlp(c: TargetConfig, layer: int, path: str, key: str) -> list[Leaf]:
    path, key = f"{path}/mlp", f"{key}.mlp"
    if not c.is_sparse(layer):
        return dense_mlp(path, key, c.hidden_size, c.intermediate_size, c.mlp_bias)
    if c.family == "gpt_oss":
        return _interleaved_experts(c, path, key)
    moe, dim = c.moe, c.hidden_size
    assert moe is not None
    leaves = projection(f"{path}/router", f"{key}.gate", dim, moe.num_experts) + _experts(c, path, f"{key}.experts")
    if moe.shared_intermediate_size:
        leaves += dense_mlp(f"{path}/shared", f"{key}.shared_expert", dim, moe.shared_intermediate_size)
        leaves += projection(f"{path}/shared_gate", f"{key}.shared_expert_gate", dim, 1)
    return leaves


def _by_expert(moe: MoeConfig) -> Callable[[np.ndarray], np.ndarray]:
    """From the experts' gate_up leaf to its view [E, in, 2, F] (see `DenseExperts`)."""
    return lambda leaf: leaf.swapaxes(0, 1) if moe.dense else leaf.swapaxes(1, 2)


def _experts(c: TargetConfig, path: str, key: str) -> list[Leaf]:
    """Qwen's experts: one tensor for all of a layer, or one for each expert."""
    moe, dim = c.moe, c.hidden_size
    assert moe is not None
    E, F, by_expert = moe.num_experts, moe.intermediate_size, _by_expert(moe)
    fused_in = (Piece(f"{key}.gate_up_proj", (E, 2 * F, dim), lambda leaf: (by_expert(leaf).transpose(0, 2, 3, 1),)),)
    fused_out = (Piece(f"{key}.down_proj", (E, dim, F), lambda leaf: (leaf.transpose(0, 2, 1),)),)
    each_in = tuple(
        Piece(f"{key}.{e}.{name}_proj.weight", (F, dim), lambda leaf, e=e, i=i: (by_expert(leaf)[e, :, i].T,))
        for e in range(E)
        for i, name in enumerate(("gate", "up"))
    )
    each_out = tuple(Piece(f"{key}.{e}.down_proj.weight", (dim, F), lambda leaf, e=e: (leaf[e].T,)) for e in range(E))
    order = slice(None) if c.family in FUSED_EXPERTS else slice(None, None, -1)
    return [
        Leaf(f"{path}/experts/gate_up", (fused_in, each_in)[order]),
        Leaf(f"{path}/experts/down", (fused_out, each_out)[order]),
    ]


def _interleaved_experts(c: TargetConfig, path: str, key: str) -> list[Leaf]:
    """gpt_oss: gate and up columns alternate, matrices are [in, out]; in MXFP4 they are [out, in]."""
    moe, dim, experts = c.moe, c.hidden_size, f"{key}.experts"
    assert moe is not None
    E, F, by_expert = moe.num_experts, moe.intermediate_size, _by_expert(moe)

    def packed(name: str, shape: tuple[int, ...], views) -> tuple[Piece]:
        return (Piece(f"{experts}.{name}_blocks", shape, views, scales=f"{experts}.{name}_scales"),)

    gate_up = (
        Piece(f"{experts}.gate_up_proj", (E, dim, 2 * F), lambda leaf: (by_expert(leaf).transpose(0, 1, 3, 2),)),
    )
    gate_up_packed = packed("gate_up_proj", (E, 2 * F, dim), lambda leaf: (by_expert(leaf).transpose(0, 3, 2, 1),))
    down = (Piece(f"{experts}.down_proj", (E, F, dim), lambda leaf: (leaf,)),)
    down_packed = packed("down_proj", (E, dim, F), lambda leaf: (leaf.transpose(0, 2, 1),))
    bias = (Piece(f"{experts}.gate_up_proj_bias", (E, 2 * F), lambda leaf: (leaf.transpose(0, 2, 1),)),)
    return [
        *projection(f"{path}/router", f"{key}.router", dim, E, bias=True),
        Leaf(f"{path}/experts/gate_up", (gate_up, gate_up_packed)),
        Leaf(f"{path}/experts/down", (down, down_packed)),
        Leaf(f"{path}/experts/gate_up_bias", (bias,)),
        whole(f"{path}/experts/down_bias", f"{experts}.down_proj_bias", (E, dim)),
    ]
