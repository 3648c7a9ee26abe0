"""Sizes and traffic of the TPU kernel: all that is decided from shapes alone."""

from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import tuning

LANES = 128
ACCUMULATOR = 2**19  # numbers of an fp32 accumulator, and of a tile of scores, that VMEM has room for (2 MiB)
TABLE = 2**19  # bytes of SMEM that a page table may take


@dataclass(frozen=True)
class Plan:
    """One call of the kernel. A unit is a sequence and `heads` of its KV heads: what one grid step works on."""

    batch: int
    width: int  # rows of the block
    kv_heads: int  # of the cache, each of them `packed` of the model side by side
    packed: int
    group: int  # query heads a KV head of the model
    head_dim: int  # numbers of a row of the cache
    page: int  # rows of a page; of a whole sequence in a dense cache
    pages: int  # of a sequence at most
    paged: bool
    item: int  # bytes of a number
    causal: bool
    scale: float
    window: int | None
    soft_cap: float | None
    write: bool
    masks: int  # trees: none, one for all sequences, or one for each
    sinks: bool
    heads: int = 1  # KV heads of a unit
    piece: int = 16  # rows of one copy
    tile: int = 16  # rows of one step of the softmax
    splits: int = 1  # parts of a context that are worked on at the same time, and merged afterwards
    cores: int = 1  # length of the parallel grid axis

    @property
    def sublanes(self) -> int:
        """Rows of a tile in memory, the grain of a copy: a number of 2 bytes shares its word with the row beside it."""
        return 32 // self.item

    @property
    def queries(self) -> int:
        """Query rows of a KV head of the model: W * G."""
        return self.width * self.group

    @property
    def rows(self) -> int:
        """Query rows of a KV head of the cache."""
        return self.packed * self.queries

    @property
    def stage(self) -> int:
        """Rows of whole memory tiles that hold the block at any offset."""
        return round_up(self.width, self.sublanes) + self.sublanes

    @property
    def capacity(self) -> int:
        return self.page * self.pages

    @property
    def units(self) -> int:
        return self.batch * self.kv_heads // self.heads

    @property
    def steps(self) -> int:
        """Grid steps of a core."""
        return self.units if self.splits > 1 else self.units // self.cores

    @property
    def tree_lanes(self) -> int:
        """A row's mask, its depth behind it, and padding."""
        return round_up(self.width + 1, LANES)

    def context(self, length: int) -> int:
        """Cache rows that are read of a sequence of `length` committed rows."""
        near = length if self.window is None else max(self.window - 1, 1)  # one at least: `tpu_rows` needs the last
        return round_up(length - max(length - near, 0) // self.piece * self.piece, self.piece)

    def bytes_moved(self, lengths: list[int]) -> int:
        """Bytes between HBM and VMEM, those of the merge behind a split included."""
        row = self.kv_heads * self.head_dim * self.item
        moved = sum(2 * self.context(length) * row for length in lengths)
        if self.write:
            tiles = sum(-(-(length % self.sublanes + self.width) // self.sublanes) for length in lengths)
            moved += 2 * tiles * self.sublanes * row
        queries = self.batch * self.kv_heads * self.queries * self.head_dim * self.item
        moved += self.splits * (queries + 2 * self.batch * self.width * row) + queries  # q, the block, the output
        if self.splits > 1:
            moved += merge_bytes(self, self.splits)
        groups = self.kv_heads // self.heads
        if self.sinks:
            moved += (self.cores if groups == 1 else self.cores * self.steps) * self.heads * LANES * 4
        if self.masks:
            units = [range(c * self.steps, (c + 1) * self.steps) for c in range(self.cores // self.splits)]
            trees = sum(len({u // groups for u in part}) if self.masks > 1 else 1 for part in units)
            moved += self.splits * trees * self.width * self.tree_lanes * 4
        return moved

    def scores(self, lengths: list[int]) -> int:
        """Query-key pairs of a call."""
        return self.kv_heads * self.rows * sum(self.context(length) + self.width for length in lengths)

    @property
    def full(self) -> list[int]:
        """Lengths of a cache without room left: what the cost estimate is for."""
        return [self.capacity - self.width] * self.batch


def round_up(x: int, multiple: int) -> int:
    """The least multiple not below x."""
    return -(-x // multiple) * multiple


def divisor(n: int, grain: int, limit: int) -> int:
    """The largest divisor of n that is a multiple of grain and not above the limit, or else grain; grain divides n."""
    parts = n // grain
    return grain * max((d for d in range(1, parts + 1) if parts % d == 0 and d * grain <= limit), default=1)


def reason_against(q: Any, keys: Any, causal: bool, mask: Any, write: bool, table: Any) -> str | None:
    """Why the kernel does not take a call; None where it does."""
    (_, W, N, _), (_, K, page, H) = q.shape, keys.shape
    item = keys.dtype.itemsize
    if keys.dtype not in (jnp.bfloat16, jnp.float32) or q.dtype != keys.dtype:
        return "queries and cache are bfloat16 or float32, both the same"
    if H % LANES or H > 512 or N // K > LANES:
        return "a head has 128, 256, 384 or 512 numbers (two of 64 side by side), a key head at most 128 query heads"
    if not page or page % (32 // item):
        return f"a page has a multiple of {32 // item} rows"
    if table is not None and 4 * table.size > TABLE:
        return f"a page table has at most {TABLE // 4} entries"
    most = longest_block(N // K, H)
    if most < W and not (causal and mask is None and write):
        return f"a block of more than {most} rows is causal, without a mask, and written"
    return None


def longest_block(group: int, head_dim: int) -> int:
    """Rows of a block whose accumulator fits; longer ones are run in parts."""
    return max(min(ACCUMULATOR // (group * head_dim), 2048 // group), 1)


def make_plan(
    q: Any, keys: Any, table: Any, *, masks: int, sinks: bool, kind: str | None = None, **options: Any
) -> Plan:
    """Sizes for shapes that `reason_against` has nothing against. `options` are those of `block_attention`."""
    (B, W, N, _), (_, K, page, H) = q.shape, keys.shape
    packed = H // q.shape[3]
    pages = 1 if table is None else table.shape[1]
    plan = Plan(
        batch=B, width=W, kv_heads=K, packed=packed, group=N // K // packed, head_dim=H, page=page, pages=pages,
        paged=table is not None, item=keys.dtype.itemsize, masks=masks, sinks=sinks, **options,
    )  # fmt: skip
    tuned = tuning(__file__)
    tuned = {**tuned["default"], **tuned.get(kind or device_kind(), {})}
    near = plan.capacity if plan.window is None else min(plan.window, plan.capacity)
    piece = divisor(page, plan.sublanes, min(tuned["piece"], near // 8))
    heads = _heads(plan, tuned["heads"])
    most = min(tuned["tile"], ACCUMULATOR // plan.rows, tuned["buffer"] // (heads * H * plan.item * 4))
    most = max(min(most, round_up(near, piece) + piece * (plan.window is not None)), piece)
    grain = lcm(piece, LANES) if lcm(piece, LANES) <= most else piece
    splits = tuned["splits"] if 20 * merge_bytes(plan, tuned["splits"]) <= _context(plan) else 1
    units = B * K // heads
    cores = splits if splits > 1 else tuned["cores"] if units % tuned["cores"] == 0 else 1
    sizes = {"piece": piece, "heads": heads, "tile": most // grain * grain, "splits": splits, "cores": cores}
    return replace(plan, **sizes)


def _heads(plan: Plan, most: int) -> int:
    """As many heads a unit as VMEM allows, but an even number of units where that can be: v5p has two cores.

    The kernel's code repeats for each head; long blocks have enough to do with two.
    """
    room = min(ACCUMULATOR // (plan.rows * plan.head_dim), max(2048 // plan.rows, 1))
    fits = [h for h in range(1, min(most, room, plan.kv_heads) + 1) if plan.kv_heads % h == 0]
    even = [h for h in fits if plan.batch * plan.kv_heads // h % 2 == 0]
    return max(even or fits or [1])


def merge_bytes(plan: Plan, splits: int) -> int:
    """Bytes that a split context costs."""
    rows = plan.batch * plan.kv_heads * (plan.queries * plan.head_dim + plan.rows * LANES)
    return 2 * splits * rows * 4


def _context(plan: Plan) -> int:
    return sum(2 * plan.context(length) * plan.kv_heads * plan.head_dim * plan.item for length in plan.full)


def device_kind() -> str:
    """The chip a program is traced for: of the mesh in use, or of the process."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else "default"
