"""Random checkpoints with the architectures of the golden cases at another size."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
CASES = ("dflash_full", "dflash_sliding", "dflash2")
WIDTHS = ("hidden_size", "head_dim", "intermediate_size", "moe_intermediate_size")


def write_pair(case: str, folder: Path, hidden_size: int, seed: int = 0) -> tuple[Path, Path]:
    """Target and drafter folders of a golden case with every width scaled to `hidden_size`; layers and heads stay."""
    torch.manual_seed(seed)
    target, drafter = folder / "target", folder / "drafter"
    config = _scaled(GOLDENS / case / "target" / "config.json", hidden_size)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # Wide enough that the output is not one token for ever.
            torch.nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter.shape[-1]))
    model.save_pretrained(target)
    _write_drafter(GOLDENS / case / "drafter", drafter, hidden_size)
    return target, drafter


def _scaled(file: Path, hidden_size: int) -> dict[str, Any]:
    config = json.loads(file.read_text())
    scale = hidden_size // config["hidden_size"]
    return config | {name: config[name] * scale for name in WIDTHS if name in config}


def _write_drafter(source: Path, folder: Path, hidden_size: int) -> None:
    old, new = json.loads((source / "config.json").read_text()), _scaled(source / "config.json", hidden_size)
    scale = hidden_size // old["hidden_size"]
    kept = {old["vocab_size"], old["dflash_config"].get("selector_rank"), 2}  # sizes that are not widths
    tensors = {}
    with safe_open(source / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            shape = [n if n in kept else n * scale for n in file.get_slice(name).get_shape()]
            tensors[name] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / math.sqrt(shape[-1])
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(new, indent=1))
