"""Which numbers a run's configuration takes."""

from operator import attrgetter
from typing import TYPE_CHECKING

from dflash_jax.errors import InputError
from dflash_jax.sharding import MESH_AXES

if TYPE_CHECKING:
    from train.run import DrafterRun

_LEAST = {
    1: (
        *(f"mesh.{axis}" for axis in MESH_AXES),
        "data.bins", "regenerate.longest", "regenerate.response", "regenerate.batch",
        "training.batch", "training.parts", "training.anchors", "training.decode.tokens",
        *(f"training.loop.{name}" for name in ("steps", "save_every", "keep", "evaluate_every", "log_every")),
        *(
            f"training.architecture.{name}"
            for name in (
                "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "taps", "sliding_window",
            )
        ),
    ),
    2: ("data.length", "training.architecture.block_size"),  # an anchor, and a token that is drafted
    0: (
        "data.held_out_count", "data.threads", "regenerate.own_prompts", "regenerate.temperature",
        "training.vocabulary", "training.head_chunk", "training.spike", "training.decode.prompts",
        "training.architecture.selector_rank", "training.optimizer.learning_rate",
    ),
}  # fmt: skip
_FRACTIONS = ("regenerate.sampled", "training.optimizer.warmup")


def check_ranges(run: "DrafterRun") -> None:
    """InputError for a number that no run takes, whatever its models are. None is a choice left to the run."""
    for least, names in _LEAST.items():
        for name in names:
            if (value := attrgetter(name)(run)) is not None and not value >= least:
                raise InputError(f"{name} is {value}; give at least {least}")
    for name in _FRACTIONS:
        if not 0 <= (value := attrgetter(name)(run)) <= 1:
            raise InputError(f"{name} is {value}; give 0 to 1")
