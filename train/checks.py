"""What is wrong with a run, as far as its configuration and those of its models tell: known before a weight is read."""

from pathlib import Path
from typing import TYPE_CHECKING

from dflash_jax.checkpoints import load_drafter_config
from dflash_jax.config import DrafterConfig, TargetConfig, load_config
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target
from dflash_jax.pair import check_fit, find_folder
from dflash_jax.sharding import RULES, abstract_mesh, check_layout
from dflash_jax.text import Tokenizer, load_tokenizer
from train.records import line_files

if TYPE_CHECKING:
    from train.run import DrafterRun


def mask_token(run: "DrafterRun", tokenizer: Tokenizer) -> int:
    """The id that the block's empty rows hold. InputError where none is known."""
    if run.mask_token is not None:
        return run.mask_token
    found = tokenizer.mask_token_id
    if found is None:
        raise InputError(f"the tokenizer of {run.target} has no mask token; give mask_token, an id that no text holds")
    return found


def check_run(run: "DrafterRun") -> None:
    """InputError for a run that cannot come to its end."""
    folder = find_folder(run.target, "target")
    target = TargetConfig.from_dict(load_config(folder))
    tokenizer = load_tokenizer(folder, target.vocab_size)
    drafter = _drafter(run, target, tokenizer)
    _check_others(run, target, drafter)
    _check_lengths(run, target)
    _check_mesh(run, target, drafter)
    for paths in (run.data.prompts, run.data.responses, run.data.held_out):
        if paths and not any(path.stat().st_size for path in line_files(paths)):
            raise InputError(f"{', '.join(map(str, paths))} is empty; give files with a line for each document")


def _drafter(run: "DrafterRun", target: TargetConfig, tokenizer: Tokenizer) -> DrafterConfig:
    made = run.training.architecture.drafter_config(target, mask_token(run, tokenizer))
    if made.num_heads % made.num_kv_heads:
        raise InputError(f"num_heads {made.num_heads} is not a multiple of num_kv_heads {made.num_kv_heads}")
    check_fit(target, made)
    return made


def _check_others(run: "DrafterRun", target: TargetConfig, drafter: DrafterConfig) -> None:
    """Check the drafters that are given: one to begin with, and one that helps to write responses."""
    if run.regenerate.drafter is not None:
        check_fit(target, load_drafter_config(find_folder(run.regenerate.drafter, "drafter")))
    if run.start is None:
        return
    start = load_drafter_config(find_folder(run.start, "drafter"))
    check_fit(target, start)
    for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "tap_ids"):
        have, want = getattr(start, name), getattr(drafter, name)
        if name == "tap_ids":
            have, want = len(have), len(want)
        if have != want:
            raise InputError(f"start {run.start} has {name} {have}, and training.architecture {want}; give its sizes")


def _check_lengths(run: "DrafterRun", target: TargetConfig) -> None:
    positions = target.max_position
    if positions and run.data.length > positions:
        raise InputError(
            f"data.length is {run.data.length}, and {Path(run.target).name} takes {positions} positions; "
            f"give at most {positions}"
        )


def _check_mesh(run: "DrafterRun", target: TargetConfig, drafter: DrafterConfig) -> None:
    sizes = run.mesh.sizes
    mesh, ways = abstract_mesh(**sizes), 1
    for axis in RULES["batch"]:
        ways *= sizes.get(axis, 1)
    if run.training.batch % ways:
        raise InputError(f"the mesh spreads the batch over {ways} devices, and training.batch is {run.training.batch}")
    if sizes:
        check_layout(shapes_of(lambda rngs: Target(target, rngs=rngs)), mesh)
        check_layout(shapes_of(lambda rngs: Drafter(drafter, rngs=rngs)), mesh)
