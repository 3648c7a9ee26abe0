"""A target and its drafter, loaded and ready to run."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax import compilation_cache
from dflash_jax.checkpoints import load_drafter, load_drafter_config, load_target
from dflash_jax.checkpoints.mask_embedding import FILE as MASK_EMBEDDING
from dflash_jax.config import DrafterConfig, TargetConfig, load_config
from dflash_jax.decoding.width import Pace, usual_widths
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target
from dflash_jax.sharding import RULES, check_mesh, placement, state_shardings
from dflash_jax.text import Tokenizer, load_tokenizer

EMBEDDED = Path(__file__).parent / "embedded"


class Graph(nnx.GraphDef):
    """flax's description of models, hashed once: `jax.jit` asks at every call, and flax's own reads all of it."""

    def __init__(self, graph: nnx.GraphDef):
        super().__init__(graph.nodes, graph.attributes, graph.num_leaves)

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class Pair:
    """A target, the drafter made for it (or None: plain decoding only), and the target's tokenizer."""

    target: Target
    drafter: Drafter | None
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh | None = None  # where the weights are spread; None: on one device

    @cached_property
    def split(self) -> tuple[Graph, nnx.State]:
        """Both models as a static graph and a pytree of weights, for `jax.jit`."""
        graph, weights = nnx.split((self.target, self.drafter))
        return Graph(graph), nnx.as_pure(weights)  # plain arrays: jit takes them apart at every call

    @cached_property
    def split_target(self) -> tuple[Graph, nnx.State]:
        """The target without the drafter, for plain decoding."""
        graph, weights = nnx.split((self.target, None))
        return Graph(graph), nnx.as_pure(weights)

    @cached_property
    def pace(self) -> Pace:
        """What is known of the widths that pay."""
        return Pace(usual_widths(1 if self.drafter is None else self.drafter.config.block_size))

    def logits(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """The target's logits after each token, in fp32.

        InputError for ids outside the vocabulary, no tokens, or more than the model's positions.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"tokens have shape {ids.shape} and dtype {ids.dtype}; give integer ids [B, T]")
        vocab, longest, length = self.target.config.vocab_size, self.target.config.max_position, ids.shape[1]
        if ids.min() < 0 or ids.max() >= vocab:
            raise InputError(f"tokens hold ids from {ids.min()} to {ids.max()}; ids are 0 to {vocab - 1}")
        if longest and length > longest:
            raise InputError(f"tokens are {length} long and the model takes {longest}; give fewer")
        size = max(16, 1 << (length - 1).bit_length())  # few shapes; a causal model does not see what follows
        padded = np.pad(ids, ((0, -len(ids) % self.batch_multiple), (0, size - length))).astype(np.int32)
        with self.on_mesh():
            return _logits(*self.split_target, self.put(padded))[: len(ids), :length]

    def on_mesh(self) -> AbstractContextManager:
        """The context in which programs for this pair are traced and run.

        Accelerators would round fp32 factors to fewer bits by default, and then the rows of a block are not what each
        is alone: the tokens of speculation would not be those of plain decoding.
        """
        mesh = nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        rounds = jax.default_backend() != "cpu" and self.target.embed.embedding.dtype == jnp.float32
        return _exactly(mesh) if rounds else mesh

    @property
    def batch_multiple(self) -> int:
        """What a batch's size has to be a multiple of, so that the mesh divides it."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape.get(axis, 1) for axis in RULES["batch"])

    def put(self, batch: Any) -> Any:
        """Host arrays of a batch, their first axis the sequences, on the devices; all processes give the same ones."""
        if self.mesh is None:
            return jax.device_put(batch)
        mesh = self.mesh

        def place(x: Any) -> jax.Array:
            x = np.asarray(x)
            where = placement(("batch", *(None,) * (x.ndim - 1)), x.shape, mesh)
            return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

        return jax.tree.map(place, batch)

    def get(self, arrays: Any) -> Any:
        """The whole of arrays on the devices, as host arrays in every process."""
        if jax.process_count() == 1:
            return jax.device_get(arrays)
        from jax.experimental.multihost_utils import process_allgather

        return jax.tree.map(lambda x: np.asarray(process_allgather(x, tiled=True)), arrays)


@contextmanager
def _exactly(mesh: AbstractContextManager) -> Iterator[None]:
    with jax.default_matmul_precision("highest"), mesh:
        yield


@partial(jax.jit, static_argnames=("graph",))
def _logits(graph: nnx.GraphDef, weights: nnx.State, tokens: Array) -> Array:
    target, _ = nnx.merge(graph, weights)
    return target.head(target.sequence(tokens).hidden)


def load(
    target: str | Path | None = None,
    drafter: str | Path | None = None,
    *,
    dtype: jnp.dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
    check: Callable[[Pair], object] | None = None,
) -> Pair:
    """Load a target and a drafter, each a folder or a hub name; without arguments, the embedded pair.

    Args:
        target: a Hugging Face checkpoint of a supported family.
        drafter: a DFlash or DFlash 2 checkpoint made for that target; None: `generate` decodes plainly.
        dtype: of the weights; by default float32 on the CPU and the checkpoint's own on accelerators.
        mesh: devices to spread the models over (see `dflash_jax.sharding.make_mesh`); None: the default device.
        check: called before a weight is read, with a pair whose models are shapes. What it raises ends the loading.

    Raises:
        InputError: a folder that cannot be read, an architecture that is not supported, a drafter that does not fit, a
            mesh that does not divide the models.
    """
    mesh = None if mesh is None else check_mesh(mesh)
    if target is None and drafter is not None:
        raise InputError("a drafter was given without its target; give both, or neither for the embedded pair")
    if target is None:
        target, drafter = EMBEDDED / "target", EMBEDDED / "drafter"
    folder = find_folder(target, "target")
    compilation_cache.enable()
    config = TargetConfig.from_dict(load_config(folder))
    drafter_folder = None if drafter is None else find_folder(drafter, "drafter")
    drafted = None if drafter_folder is None else load_drafter_config(drafter_folder)
    if drafted is not None:
        check_fit(config, drafted)
    tokenizer_folder = EMBEDDED / "tokenizer" if folder == EMBEDDED / "target" else folder
    tokenizer = load_tokenizer(tokenizer_folder, config.vocab_size)
    outline = _outline(config, drafted, tokenizer, dtype, mesh)
    if check is not None:
        check(outline)
    model = load_target(folder, dtype, mesh)[1]
    return Pair(
        model, None if drafter_folder is None else load_drafter(drafter_folder, dtype, mesh)[1], tokenizer, mesh
    )


def _outline(
    target: TargetConfig,
    drafter: DrafterConfig | None,
    tokenizer: Tokenizer,
    dtype: jnp.dtype | None,
    mesh: jax.sharding.Mesh | None,
) -> Pair:
    """Return a pair whose models are shapes, laid out. InputError for a mesh that does not divide them.

    What checkpoints on accelerators hold is not looked up: it has at least two bytes a number.
    """
    kind = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)

    def placed(model: Any) -> Any:
        graph, state = nnx.split(model)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where = jax.tree.map(lambda _: here, state) if mesh is None else state_shardings(state, mesh)
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
        return nnx.merge(graph, shapes)

    made = placed(shapes_of(lambda rngs: Target(target, dtype=kind, rngs=rngs)))
    drafts = None if drafter is None else placed(shapes_of(lambda rngs: Drafter(drafter, dtype=kind, rngs=rngs)))
    return Pair(made, drafts, tokenizer, mesh)


def find_folder(name: str | Path, role: str) -> Path:
    """A local folder as it is; a hub name is downloaded, or taken from the cache."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise InputError(f"{role} {name} is not a folder; give a checkpoint folder, or a hub name such as owner/model")
    from huggingface_hub import snapshot_download

    try:
        patterns = [
            "*.safetensors",
            "*.safetensors.index.json",
            "*.json",
            "*.jinja",
            "*.model",
            "*.txt",
            MASK_EMBEDDING,
        ]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # the hub client and its transport have many errors of their own
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{role} {name} is no local folder and cannot be had from the hub: {reason}") from error


def check_fit(target: TargetConfig, drafter: DrafterConfig) -> None:
    """InputError if the drafter was made for another target."""
    facts = [
        ("hidden size", drafter.hidden_size, target.hidden_size),
        ("vocabulary", drafter.vocab_size, target.vocab_size),
        ("number of target layers", drafter.num_target_layers, target.num_layers),
    ]
    for what, got, want in facts:
        if got not in (want, 0):  # 0: not said
            raise InputError(f"the drafter's {what} is {got} and the target's is {want}; give the target's own drafter")
    last = target.num_layers - 1
    if max(drafter.tap_ids) > last or min(drafter.tap_ids) < 0:
        raise InputError(f"the drafter taps layers {list(drafter.tap_ids)}; the target's layers are 0 to {last}")
    if not 0 <= drafter.mask_token_id < target.vocab_size:
        top = target.vocab_size - 1
        raise InputError(f"the drafter's mask token is {drafter.mask_token_id}; the target's tokens are 0 to {top}")
