"""What a name table is made of: for each leaf of a model, the checkpoint tensors that fill it.

A piece says where one checkpoint tensor lies inside its leaf, as numpy views. The same views read (the tensor's values
are assigned to them) and write (they are copied out), so a table cannot load one layout and export another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Views = Callable[[np.ndarray], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor.

    `views(leaf)` are the parts of the leaf that hold the tensor's rows, one after the other along its first axis; a
    part may have more axes than the tensor, only the row-major order of its elements counts. `scales` names the scales
    of an MXFP4 tensor, whose `shape` is that of the decoded values.
    """

    key: str
    shape: tuple[int, ...]
    views: Views
    scales: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The names in the checkpoint."""
        return (self.key,) if self.scales is None else (self.key, self.scales)


@dataclass(frozen=True)
class Leaf:
    """One array of the model.

    `layouts` are the ways a checkpoint may hold it; the first one is written. A `wide` leaf stays float32 in any model.
    """

    path: str
    layouts: tuple[tuple[Piece, ...], ...]
    wide: bool = False


def whole(path: str, key: str, shape: tuple[int, ...], wide: bool = False) -> Leaf:
    """A leaf stored as it is."""
    return Leaf(path, ((Piece(key, shape, lambda leaf: (leaf,)),),), wide)


def projection(path: str, key: str, inputs: int, outputs: int, bias: bool = False) -> list[Leaf]:
    """A matrix, [in, out] here and [out, in] in checkpoints, and its bias."""
    kernel = Leaf(f"{path}/kernel", ((Piece(f"{key}.weight", (outputs, inputs), lambda leaf: (leaf.T,)),),))
    return [kernel, whole(f"{path}/bias", f"{key}.bias", (outputs,))] if bias else [kernel]


def dense_mlp(path: str, key: str, dim: int, columns: int, bias: bool = False) -> list[Leaf]:
    """gate and up side by side in one array, and down."""
    gate_up = tuple(
        Piece(f"{key}.{name}_proj.weight", (columns, dim), lambda leaf, i=i: (leaf[:, i].T,))
        for i, name in enumerate(("gate", "up"))
    )
    leaves = [
        Leaf(f"{path}/gate_up/kernel", (gate_up,)),
        *projection(f"{path}/down", f"{key}.down_proj", columns, dim, bias),
    ]
    if bias:
        biases = tuple(
            Piece(f"{key}.{name}_proj.bias", (columns,), lambda leaf, i=i: (leaf[i],))
            for i, name in enumerate(("gate", "up"))
        )
        leaves.append(Leaf(f"{path}/gate_up/bias", (biases,)))
    return leaves
