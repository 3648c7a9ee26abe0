"""`dflash plan --recipe`: the training step of one of the recipes, with everything that the recipe says."""

import dataclasses
import functools
from pathlib import Path

from dflash_jax.abstract import read_config
from dflash_jax.config import TargetConfig
from dflash_jax.errors import InputError
from dflash_jax.plan import Request, Trained
from train import configuration
from train.checks import check_step, made_drafter
from train.objective import Objective
from train.plan import TrainPlan, planned
from train.ranges import check_ranges
from train.run import DrafterRun


def planned_recipe(
    recipe: Path, *, target: str | None = None, topology: str | None = None, compile: bool = True
) -> tuple[Request, Trained]:
    """What `dflash_jax.plan.plan` takes. `target` is its config.json, where the recipe does not name a local folder.

    InputError for a recipe that cannot be read, or that names no accelerators where `topology` does not either.
    """
    run = configuration.read_config(DrafterRun, recipe)
    check_ranges(run)
    pod = topology or run.pod
    if pod is None:
        raise InputError(f"{recipe} names no pod; give --topology")
    path = target or run.target
    config = TargetConfig.from_dict(read_config(path))
    mask = config.vocab_size - 1 if run.mask_token is None else run.mask_token
    sizes = {axis: size for axis, size in dataclasses.asdict(run.mesh).items() if size > 1}
    check_step(run, config)
    request = Request(
        target=path,
        drafter=made_drafter(run, config, mask),
        topology=pod,
        mesh=",".join(f"{axis}={size}" for axis, size in sizes.items()),
        program="train",
        batch=run.training.batch,
        context=run.data.length,
        compile=compile,
    )
    objective = {field.name: getattr(run.training, field.name) for field in dataclasses.fields(Objective)}
    step = TrainPlan(Objective(**objective), run.training.optimizer, run.training.parts)
    return request, functools.partial(planned, config=step)
