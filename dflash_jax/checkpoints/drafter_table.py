"""The name table of DFlash and DFlash 2 drafters."""

from dflash_jax.checkpoints.table import Leaf, Piece, dense_mlp, projection, whole
from dflash_jax.config import DrafterConfig

PREFIXES = ("", "model.")
MASK_EMBEDDING = "mask_embedding"  # the leaf that has a file of its own


def drafter_table(config: DrafterConfig) -> list[Leaf]:
    """Every leaf of `models.drafter.Drafter`."""
    c, dim = config, config.hidden_size
    leaves = [
        *projection("fc", "fc", len(c.tap_ids) * dim, dim),
        whole("hidden_norm/weight", "hidden_norm.weight", (dim,)),
        whole("norm/weight", "norm.weight", (dim,)),
        *_key_value_projections(c),
    ]
    for i in range(c.num_layers):
        leaves += _layer(c, f"layers/{i}", f"layers.{i}")
    if c.mask_embedding:
        leaves.append(whole(MASK_EMBEDDING, MASK_EMBEDDING, (dim,)))
    return leaves + _selector(c) if c.selector_rank else leaves


def _key_value_projections(c: DrafterConfig) -> list[Leaf]:
    """All layers' keys and values as one array: a context row is projected for every layer at once."""
    columns = c.num_kv_heads * c.head_dim
    places = [(f"layers.{i}.self_attn.{name}_proj", i, j) for i in range(c.num_layers) for j, name in enumerate("kv")]
    kernels = tuple(
        Piece(f"{key}.weight", (columns, c.hidden_size), lambda leaf, i=i, j=j: (leaf[i, :, j].T,))
        for key, i, j in places
    )
    leaves = [Leaf("kv_proj/kernel", (kernels,))]
    if c.attention_bias:
        biases = tuple(Piece(f"{key}.bias", (columns,), lambda leaf, i=i, j=j: (leaf[i, j],)) for key, i, j in places)
        leaves.append(Leaf("kv_proj/bias", (biases,)))
    return leaves


def _layer(c: DrafterConfig, path: str, key: str) -> list[Leaf]:
    dim, queries = c.hidden_size, c.num_heads * c.head_dim
    leaves = [
        whole(f"{path}/input_norm/weight", f"{key}.input_layernorm.weight", (dim,)),
        whole(f"{path}/post_norm/weight", f"{key}.post_attention_layernorm.weight", (dim,)),
        *projection(f"{path}/attention/q_proj", f"{key}.self_attn.q_proj", dim, queries, c.attention_bias),
        *projection(f"{path}/attention/o_proj", f"{key}.self_attn.o_proj", queries, dim, c.attention_bias),
        whole(f"{path}/attention/q_norm/weight", f"{key}.self_attn.q_norm.weight", (c.head_dim,)),
        whole(f"{path}/attention/k_norm/weight", f"{key}.self_attn.k_norm.weight", (c.head_dim,)),
        *dense_mlp(f"{path}/mlp", f"{key}.mlp", dim, c.intermediate_size),
    ]
    if c.conv_kernel_size:
        leaves += _convolution(c, f"{path}/attention_conv", f"{key}.attention_conv")
        leaves += _convolution(c, f"{path}/mlp_conv", f"{key}.mlp_conv")
    return leaves


def _convolution(c: DrafterConfig, path: str, key: str) -> list[Leaf]:
    kernels = 2 * c.conv_kernel_size * (c.hidden_size // c.conv_group_size)
    base = whole(f"{path}/base", f"{key}.base_kernel", (2, c.conv_kernel_size, c.hidden_size))
    return [base, *projection(f"{path}/proj", f"{key}.kernel_projection", c.hidden_size, kernels)]


def _selector(c: DrafterConfig) -> list[Leaf]:
    return [
        _codebook(c, "predecessor"),
        _codebook(c, "successor"),
        *projection("selector/hidden", "candidate_selector.hidden_projection", c.hidden_size, c.selector_rank),
    ]


def _codebook(c: DrafterConfig, name: str) -> Leaf:
    """A codebook under its published name, or under the one with `.weight` that early exports had."""
    published = f"candidate_selector.{name}_codebook"
    layouts = (whole("", key, (c.vocab_size, c.selector_rank)).layouts[0] for key in (published, f"{published}.weight"))
    return Leaf(f"selector/{name}", tuple(layouts))
