"""Sizes of the TPU kernels: how rows are folded and tiled, what stays in VMEM, and the bytes that move for it."""

import math
from dataclasses import dataclass

from pallas_kernels.dispatch import tuning

LANES = 128
MOST_ROWS = 1280  # folded rows of a step; where more were needed to fill whole lanes, blocks get rows added
SUBLANES = 16  # of a bf16 tile; a multiple of fp32's 8


@dataclass(frozen=True)
class Tiles:
    """Wanted sizes: folded query rows and context positions of one product; bytes of VMEM for the context that stays
    there, and for everything.
    """

    rows: int
    context: int
    resident: int
    limit: int

    @classmethod
    def tuned(cls) -> "Tiles":
        entry = tuning(__file__)["default"]
        return cls(entry["rows"], entry["context"], entry["resident_mib"] << 20, entry["limit_mib"] << 20)


@dataclass(frozen=True)
class Plan:
    """The padded problem and its tiles.

    One grid step works on `tile_anchors` blocks and one group of KV heads: `packed` heads side by side in the lanes
    (two of size 64, else one). Its `packed * queries` query heads are stacked: row `i * own + a * rows + w`.
    """

    batch: int
    anchors: int
    rows: int
    real_rows: int
    context: int
    real_context: int
    groups: int
    packed: int
    queries: int
    head: int
    item: int  # bytes of an element
    tile_anchors: int
    tile_context: int
    span: int  # context positions in VMEM at a time, forward
    back_span: int  # and backward, where the sums of their gradients stay too
    buffers: int
    back_buffers: int
    vmem_limit: int

    @property
    def lanes(self) -> int:
        return self.packed * self.head

    @property
    def heads(self) -> int:
        """Query heads of a group."""
        return self.packed * self.queries

    @property
    def own(self) -> int:
        """Rows of keys that the blocks of a step bring along."""
        return self.tile_anchors * self.rows

    @property
    def folded(self) -> int:
        return self.heads * self.own

    @property
    def steps(self) -> int:
        return self.anchors // self.tile_anchors

    @property
    def spans(self) -> int:
        return self.context // self.span

    @property
    def back_spans(self) -> int:
        return self.context // self.back_span

    def _bytes(self) -> tuple[int, int, int, int]:
        """Of queries, of a block tensor, of a context tensor, of log-sum-exps, in all."""
        rows = self.batch * self.groups * self.anchors * self.rows
        lanes = self.lanes * self.item
        context = self.batch * self.groups * self.context * lanes
        return rows * self.heads * self.head * self.item, rows * lanes, context, rows * self.heads * 4

    def forward_bytes(self) -> int:
        """Moved by the forward kernel; with several spans, when all anchors see all of them."""
        q, block, context, lse = self._bytes()
        return 2 * q + 2 * block + 2 * context * (self.steps if self.spans > 1 else 1) + lse + self.scalar_bytes()

    def backward_bytes(self) -> int:
        """Moved by the backward kernel: with several spans all rows are read, and dq is written in fp32, for each."""
        q, block, context, lse = self._bytes()
        spans = self.back_spans
        dq = q if spans == 1 else spans * q * 4 // self.item
        return spans * (3 * q + lse) + dq + 4 * block + 4 * context + self.scalar_bytes()

    def scalar_bytes(self) -> int:
        """Anchors, starts of their documents, and the four bounds of each step."""
        return 4 * self.batch * (2 * self.anchors + 4 * self.steps)

    def products(self, window: int | None) -> int:
        """Flops of one product of all query rows with what they see, for anchors spread evenly over the context."""
        T = self.real_context
        reach = T if window is None else min(window, T)
        rows = self.batch * self.groups * self.anchors * self.rows * self.heads
        return int(2 * rows * self.lanes * (reach * (1 - reach / (2 * T)) + self.own))


def make_plan(shape: tuple[int, ...], kv_heads: int, context: int, item: int, tiles: Tiles | None = None) -> Plan:
    """The plan for queries [B A W N H] of `item` bytes a number."""
    tiles = tiles or Tiles.tuned()
    B, A, real_rows, N, H = shape
    queries, packed = N // kv_heads, 1
    if H == LANES // 2 and kv_heads % 2 == 0:
        packed = 2
    elif H % LANES and not (H == LANES // 2 and kv_heads == 1):
        H = _up(H, LANES)
    heads = packed * queries
    rows = real_rows
    while _granule(rows, heads) * rows * heads > MOST_ROWS and rows % SUBLANES:
        rows += 1
    granule = _granule(rows, heads)
    tile_anchors = granule * max(1, tiles.rows // (granule * rows * heads))
    tile_anchors = min(tile_anchors, _up(A, granule))
    # Rows may be more than wanted; scores [tile_context, rows] then become shorter.
    room = 3 * tiles.rows * tiles.context // (2 * tile_anchors * rows * heads)
    tile_context = min(tiles.context, max(SUBLANES, 1 << (room.bit_length() - 1)), _up(context, SUBLANES))
    padded = _up(max(context, 1), tile_context)
    lanes = packed * H
    # Keys and values of a position; backward also their fp32 sums.
    span, buffers = _span(padded, tile_context, 2 * lanes * item, 0, tiles.resident)
    back_span, back_buffers = _span(padded, tile_context, 2 * lanes * item, 2 * lanes * 4, tiles.resident)
    return Plan(
        batch=B, anchors=_up(A, tile_anchors), rows=rows, real_rows=real_rows, context=padded, real_context=context,
        groups=kv_heads // packed, packed=packed, queries=queries, head=H, item=item, tile_anchors=tile_anchors,
        tile_context=tile_context, span=span, back_span=back_span, buffers=buffers, back_buffers=back_buffers,
        vmem_limit=tiles.limit,
    )  # fmt: skip


def _span(context: int, tile: int, read: int, kept: int, budget: int) -> tuple[int, int]:
    """The longest piece of the context, in whole tiles, that fits the budget, and with how many buffers."""
    for parts in range(1, context // tile + 1):
        span = context // parts
        if context % parts or span % tile:
            continue
        for buffers in (2, 1):
            if span * (buffers * read + kept) <= budget and (buffers == 2 or parts == 1):
                return span, buffers
    return tile, 2


def _granule(rows: int, heads: int) -> int:
    """The fewest blocks whose folded rows fill whole lanes, and whose own rows fill whole sublanes."""
    return math.lcm(LANES // math.gcd(LANES, rows * heads), SUBLANES // math.gcd(SUBLANES, rows))


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
