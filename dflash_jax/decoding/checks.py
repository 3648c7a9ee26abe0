"""What a request may ask for."""

from typing import Any

import jax
import numpy as np

from dflash_jax.decoding.width import Width
from dflash_jax.errors import InputError
from dflash_jax.pair import Pair


def check_min_tokens(least: int, max_new: int, ends: int, vocab: int) -> None:
    """InputError for a least length that cannot be reached."""
    if least > max_new:
        raise InputError(f"min_tokens is {least}, and max_new_tokens {max_new}; give at most as many")
    if least and ends >= vocab:
        raise InputError(f"min_tokens is {least}, and each of the {vocab} tokens is a stop token; leave some out")


def split_stops(stop: Any, vocab: int) -> tuple[list[str], list[int]]:
    """Stop texts and stop ids."""
    entries = list(stop) if isinstance(stop, (list, tuple, set, frozenset, np.ndarray)) else [stop]
    for entry in entries:
        if isinstance(entry, str) and entry:
            continue
        if isinstance(entry, bool) or not isinstance(entry, (int, np.integer)) or not 0 <= entry < vocab:
            raise InputError(
                f"stop holds {entry!r}; give texts of at least one character, or ids from 0 to {vocab - 1}"
            )
    return [e for e in entries if isinstance(e, str)], [int(e) for e in entries if not isinstance(e, str)]


def check_width(pair: Pair, draft: bool, width: Width | None) -> int:
    """Most rows of a round: 1 for plain decoding, else as asked for or the drafter's block."""
    if pair.drafter is None or not draft:
        if width not in (None, 1):
            raise InputError(f"width is {width}, and there is no drafter at work; leave width out, or give a drafter")
        return 1
    block = pair.drafter.config.block_size
    if width == "adaptive" and jax.process_count() > 1:
        raise InputError("width is adaptive, and several processes would each choose by their own clock; give a number")
    if width in (None, "adaptive"):
        return block
    if isinstance(width, bool) or not isinstance(width, (int, np.integer)) or not 1 <= width <= block:
        raise InputError(
            f"width is {width!r}; give a whole number from 1 to {block}, the drafter's block size, or 'adaptive'"
        )
    return int(width)
