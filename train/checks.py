"""What is wrong with a run, as far as its configuration and those of its models tell: known before a weight is read."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from flax import nnx

from dflash_jax.checkpoints import load_drafter_config
from dflash_jax.config import DrafterConfig, TargetConfig, load_config
from dflash_jax.decoding.checks import split_stops
from dflash_jax.errors import InputError
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.shapes import shapes_of
from dflash_jax.models.target import Target
from dflash_jax.pair import check_fit, find_folder
from dflash_jax.sharding import RULES, AnyMesh, abstract_mesh, check_layout
from dflash_jax.text import Tokenizer, load_tokenizer
from train.checkpoints import check_stored
from train.drafter import check_start
from train.objective import check_whole
from train.optimizer import make_optimizer
from train.ranges import check_ranges
from train.records import MADE_FROM, check_claim, line_files
from train.regenerate import settings
from train.sampled import check_size
from train.step import check_parts, init_state

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
    check_ranges(run)
    _check_files(run)
    folder = find_folder(run.target, "target")
    target = TargetConfig.from_dict(load_config(folder))
    tokenizer = load_tokenizer(folder, target.vocab_size)
    mesh = abstract_mesh(**run.mesh.sizes)
    drafter = _started(run, target, made_drafter(run, target, mask_token(run, tokenizer)))
    _check_lengths(run, target)
    check_step(run, target)
    if run.mesh.sizes:
        check_layout(shapes_of(lambda rngs: Target(target, rngs=rngs)), mesh)
        check_layout(_shapes(drafter), mesh)
    _check_responses(run, target, mesh)
    _check_begun(run, drafter)


def _check_files(run: "DrafterRun") -> None:
    data = run.data
    written = bool(data.prompts or run.regenerate.own_prompts)
    # Responses that an earlier command has written are read where there is nothing to answer.
    read = () if written or data.responses else (run.out / "responses",)
    if read and not read[0].exists():
        raise InputError("data.prompts and data.responses are empty; give one of them, or regenerate.own_prompts")
    for paths in (data.prompts, data.responses, data.held_out, read):
        if paths and not any(_has_lines(path) for path in line_files(paths)):
            raise InputError(f"{_listed(paths)} is empty; give files with a line for each document")


def _has_lines(path: Path) -> bool:
    with path.open("rb") as file:
        return any(line.strip() for line in file)


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def made_drafter(run: "DrafterRun", target: TargetConfig, mask: int) -> DrafterConfig:
    """Return the drafter that is made for a target. InputError for sizes that no drafter of it can have."""
    sizes = run.training.architecture
    made = sizes.drafter_config(target, mask)
    if made.num_heads % made.num_kv_heads:
        raise InputError(f"num_heads {made.num_heads} is not a multiple of num_kv_heads {made.num_kv_heads}")
    if made.head_dim % 2:
        raise InputError(f"head_dim is {made.head_dim}, and rotation takes its numbers in twos; give an even one")
    if not sizes.tap_ids and sizes.taps > target.num_layers:
        raise InputError(f"taps is {sizes.taps}, and the target has {target.num_layers} layers; give at most as many")
    if made.selector_rank and not 1 <= made.selector_top_k <= target.vocab_size:
        raise InputError(f"selector_top_k is {made.selector_top_k}; give 1 to {target.vocab_size}, the target's tokens")
    check_fit(target, made)
    return made


def _started(run: "DrafterRun", target: TargetConfig, drafter: DrafterConfig) -> DrafterConfig:
    """Return the drafter as it is trained; InputError where it cannot begin as the one that is given."""
    if run.start is None:
        return drafter
    folder = find_folder(run.start, "drafter")
    start = load_drafter_config(folder)
    check_fit(target, start)
    for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "tap_ids"):
        have, want = getattr(start, name), getattr(drafter, name)
        if name == "tap_ids":
            have, want = len(have), len(want)
        if have != want:
            raise InputError(f"start {run.start} has {name} {have}, and training.architecture {want}; give its sizes")
    made = dataclasses.replace(drafter, mask_embedding=start.mask_embedding)
    check_start(folder, *(dict(nnx.to_flat_state(nnx.state(_shapes(config)))) for config in (start, made)))
    return made


def _shapes(config: DrafterConfig) -> Drafter:
    return shapes_of(lambda rngs: Drafter(config, rngs=rngs))


def _check_lengths(run: "DrafterRun", target: TargetConfig) -> None:
    positions, length, block = target.max_position, run.data.length, run.training.architecture.block_size
    if positions and length > positions:
        raise InputError(
            f"data.length is {length}, and {Path(run.target).name} takes {positions} positions; "
            f"give at most {positions}"
        )
    if block > length:
        raise InputError(f"block_size is {block}, and data.length {length}; give a smaller block, or longer rows")


def check_step(run: "DrafterRun", target: TargetConfig) -> None:
    """InputError for a batch, a loss or a sampled vocabulary that a step does not take on the run's mesh."""
    config, mesh = run.training, abstract_mesh(**run.mesh.sizes)
    batch, vocab = (math.prod(mesh.shape[axis] for axis in RULES[name]) for name in ("batch", "vocab"))
    check_parts(config.batch, config.parts, batch)
    if config.loss == "opd":
        check_whole(sampled=config.vocabulary > 0, cached=run.data.taps == "cache")
    if config.vocabulary:
        tokens = config.batch // config.parts * run.data.length
        check_size(config.vocabulary, tokens, target.vocab_size, vocab)


def _check_responses(run: "DrafterRun", target: TargetConfig, mesh: AnyMesh) -> None:
    """Check what the target writes, and with which helper, and whether a folder of another run is in its way."""
    config, width = run.regenerate, 1  # without a helper
    if config.drafter is not None:
        helper = load_drafter_config(find_folder(config.drafter, "drafter"))
        check_fit(target, helper)
        check_layout(_shapes(helper), mesh)
        width = helper.block_size
    split_stops(config.stop, target.vocab_size)
    if config.own_prompts and not config.own_openings:
        raise InputError('own_openings is empty; give how messages begin, [""] for nothing')
    if (run.data.prompts or config.own_prompts) and not run.data.responses:
        made_from = run.out / "responses" / MADE_FROM
        check_claim(made_from, settings(config, width), "responses", unknown=("prompts",))


def _check_begun(run: "DrafterRun", drafter: DrafterConfig) -> None:
    """Check that taps and checkpoints in the folder are of such a run."""
    if run.data.taps == "cache":
        for name in ("learned", "held_out"):
            tapped = {"tap_ids": list(drafter.tap_ids)}
            check_claim(run.out / "taps" / name / MADE_FROM, tapped, "taps", unknown=("target", "documents"))
    optimizer = make_optimizer(run.training.optimizer, run.training.loop.steps)
    params = nnx.state(_shapes(drafter))
    check_stored(run.out, jax.eval_shape(partial(init_state, optimizer=optimizer), params))
