"""How the CPU form cuts a jagged batch into tiles, and what of a tile depends on positions and times alone.

Rows are sorted by length and dealt into groups of nearly equal ones; a group is a dense block, a tile some query rows
of it. So padding is within a group only, a tile's scores stay in the processor's caches, and a causal tile stops at its
diagonal. Masks and buckets are the same for every layer of a stack: a plan is kept for as long as calls ask for the
same offsets, counts and times (compared by content, so nobody has to say when a batch is over).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gr.kernels.hstu_attention.reference import mask_ids, visible
from gr.kernels.hstu_attention.time_buckets import time_bucket
from gr.kernels.hstu_attention.types import Mask

TILE_SCORES = 131_072
"""Scores in a tile, heads included: 512 KiB of float32: less costs more calls, more falls out of the caches."""
TILE_QUERIES = 128
"""Most query rows in a causal tile: fewer compute less above the diagonal, but call more."""
CALL_SCORES = 8_000
"""What one more group costs in calls, counted in scores: padding up to this is cheaper than another group."""
KEPT_BYTES = 256 << 20
"""Masks and buckets kept from layer to layer; what goes beyond is made anew in each call."""


@dataclass(frozen=True)
class Group:
    """``rows`` of the batch as one dense block.

    Attributes:
        rows: ``(b,)`` int64 row numbers.
        num_queries: Width of the block of queries.
        num_keys: Width of the block of keys.
        q_start: First slot of the block among all padded queries, in tokens.
        k_start: The same for keys.
    """

    rows: Tensor
    num_queries: int
    num_keys: int
    q_start: int
    k_start: int

    @cached_property
    def size(self) -> int:
        """b."""
        return self.rows.shape[0]


@dataclass(frozen=True)
class Tile:
    """Query rows ``begin:end`` of a group."""

    group: Group
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Where things lie in a padded tensor: group after group, in a group ``(row, head, index)``.

    Attributes:
        tokens: ``(T,)`` slot of each token, heads left aside.
        slots: ``(T * H,)`` slot of each (token, head).
        sources: ``(rows,)`` the (token, head) of each slot, 0 for an empty one.
        empty: Slots that hold nothing.
    """

    tokens: Tensor
    slots: Tensor
    sources: Tensor
    empty: Tensor


@dataclass(frozen=True)
class Detail:
    """What a tile's scores need beside q and k.

    Attributes:
        keys: Range of keys outside of which the tile sees nothing.
        diagonal: Plain causal tiles keep what is on or below this diagonal; None: see ``hidden``.
        hidden: ``(b or 1, m, n)`` bool, pairs that are not seen; None with ``diagonal``.
        time_index: ``(b * m * n,)`` int64 into the time table.
        position_index: The same into the position table; None where distance alone decides (a Toeplitz matrix).
    """

    keys: tuple[int, int]
    diagonal: int | None = None
    hidden: Tensor | None = None
    time_index: Tensor | None = None
    position_index: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that a plan depends on.

    Attributes:
        num_heads: H.
        num_buckets: Entries of the time table; None without one.
        position_entries: Entries of a position table that must be indexed pair by pair; None: there is none, or the
            distance of two tokens within the block decides.
        clamped_ids: Whether it is indexed by the mask's ids (``position_ids`` "target_clamped").
    """

    q_offsets: Tensor
    kv_offsets: Tensor | None
    mask: Mask
    num_heads: int
    num_buckets: int | None = None
    bucket_width: float = 0.0
    query_times: Tensor | None = None
    key_times: Tensor | None = None
    position_entries: int | None = None
    clamped_ids: bool = False

    def scalars(self) -> tuple:
        """The part that is compared by value."""
        mask = self.mask
        rules = (mask.causal, mask.window, mask.full_tail, mask.target_group)
        positions = (self.position_entries, self.clamped_ids)
        return (*rules, self.num_heads, self.num_buckets, self.bucket_width, *positions)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The part that is compared by content."""
        mask = self.mask
        return (
            self.q_offsets,
            self.kv_offsets,
            mask.num_contextual,
            mask.num_targets,
            self.query_times,
            self.key_times,
        )


class Plan:
    """Tiles of a batch.

    Attributes:
        queries: Layout of the padded queries.
        keys: Layout of the padded keys.
        tiles: In ascending order of position within each group.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.delta = request.kv_offsets is not None
        self.q_lengths = request.q_offsets.diff().long()
        self.k_lengths = request.kv_offsets.diff().long() if self.delta else self.q_lengths
        self.groups = _groups(self.q_lengths, self.k_lengths, request.num_heads)
        q_width = [(g.rows, g.num_queries, g.q_start) for g in self.groups]
        k_width = [(g.rows, g.num_keys, g.k_start) for g in self.groups]
        heads = request.num_heads
        self.queries = _layout(self.q_lengths, q_width, heads)
        self.keys = _layout(self.k_lengths, k_width, heads) if self.delta else self.queries
        mask = request.mask
        plain = mask.window is None and mask.num_contextual is None and mask.num_targets is None
        self._triangular = mask.causal and plain and not self.delta
        self.tiles = [tile for group in self.groups for tile in self._cut(group)]
        self._times: tuple[Tensor, Tensor] | None = None
        self._kept: dict[int, Detail] = {}
        self._kept_bytes = 0

    @property
    def longest(self) -> int:
        """Widest block."""
        return max((g.num_keys for g in self.groups), default=0)

    def _cut(self, group: Group) -> list[Tile]:
        if group.num_queries == 0:
            return []
        scores = group.size * self.request.num_heads * group.num_queries * group.num_keys
        pieces = max(-(-scores // TILE_SCORES), -(-group.num_queries // TILE_QUERIES))
        step = -(-group.num_queries // min(pieces, group.num_queries))
        starts = range(0, group.num_queries, step)
        return [Tile(group, begin, min(begin + step, group.num_queries)) for begin in starts]

    def detail(self, number: int) -> Detail:
        """Masks and indices of tile ``number``, from memory if they are kept."""
        found = self._kept.get(number)
        if found is None:
            found = self._make(self.tiles[number])
            tensors = (found.hidden, found.time_index, found.position_index)
            size = sum(t.numel() * t.element_size() for t in tensors if t is not None)
            if self._kept_bytes + size <= KEPT_BYTES:
                self._kept[number], self._kept_bytes = found, self._kept_bytes + size
        return found

    def _make(self, tile: Tile) -> Detail:
        group, request = tile.group, self.request
        hidden = None
        if self._triangular:
            low, high = 0, tile.end
        else:
            q_pos, k_pos = self._positions(tile)
            lengths, mask = self.k_lengths[group.rows], _mask_of(request.mask, group.rows)
            seen = visible(q_pos, k_pos, lengths, mask) & (k_pos < lengths[:, None])[:, None, :]
            columns = seen.any(dim=0).any(dim=0).nonzero()
            if columns.numel() == 0:
                return Detail(keys=(0, 0))
            low, high = int(columns[0]), int(columns[-1]) + 1
            hidden = ~seen[:, :, low:high]
        return Detail(
            keys=(low, high),
            diagonal=tile.begin if self._triangular else None,
            hidden=hidden,
            time_index=self._time_index(tile, low, high),
            position_index=self._position_index(tile, low, high),
        )

    def _positions(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """``(b, m)`` and ``(1, n)``; in the delta form the queries are a sequence's last rows."""
        q_pos = torch.arange(tile.begin, tile.end)[None]
        rows = tile.group.rows
        q_pos = q_pos + (self.k_lengths - self.q_lengths)[rows][:, None]
        return q_pos, torch.arange(tile.group.num_keys)[None]

    def _time_index(self, tile: Tile, low: int, high: int) -> Tensor | None:
        request, group = self.request, tile.group
        if request.num_buckets is None:
            return None
        if self._times is None:
            heads = request.num_heads
            q_times = request.query_times.new_zeros(self.queries.sources.shape[0] // heads)
            k_times = request.key_times.new_zeros(self.keys.sources.shape[0] // heads)
            q_times[self.queries.tokens] = request.query_times
            k_times[self.keys.tokens] = request.key_times
            self._times = q_times, k_times
        size = group.size
        q_times = self._times[0][group.q_start : group.q_start + size * group.num_queries].view(size, -1)
        k_times = self._times[1][group.k_start : group.k_start + size * group.num_keys].view(size, -1)
        seconds = q_times[:, tile.begin : tile.end, None] - k_times[:, None, low:high]
        return time_bucket(seconds, request.bucket_width, request.num_buckets).long().view(-1)

    def _position_index(self, tile: Tile, low: int, high: int) -> Tensor | None:
        entries = self.request.position_entries
        if entries is None:
            return None
        q_pos, k_pos = self._positions(tile)
        rows = tile.group.rows
        q_ids, k_ids = q_pos, k_pos[:, low:high]
        if self.request.clamped_ids:
            lengths, mask = self.k_lengths[rows], _mask_of(self.request.mask, rows)
            q_ids, k_ids = mask_ids(q_ids, lengths, mask)[0], mask_ids(k_ids, lengths, mask)[0]
        half = entries // 2
        distance = (k_ids[:, None, :] - q_ids[:, :, None] + half).clamp(0, 2 * half)
        return distance.expand(len(rows), -1, -1).reshape(-1)

    def visible_counts(self) -> Tensor:
        """``(T_q,)`` keys that each query sees, at least 1."""
        heads = self.request.num_heads
        counts = torch.empty(self.queries.sources.shape[0] // heads, dtype=torch.int64)
        for number, tile in enumerate(self.tiles):
            group, detail = tile.group, self.detail(number)
            size = group.size
            block = counts[group.q_start : group.q_start + size * group.num_queries].view(size, -1)
            if detail.diagonal is not None:
                block[:, tile.begin : tile.end] = torch.arange(tile.begin, tile.end) + 1
            elif detail.hidden is None:
                block[:, tile.begin : tile.end] = 1
            else:
                block[:, tile.begin : tile.end] = (~detail.hidden).sum(-1).clamp(min=1)
        return counts[self.queries.tokens]


_plans: list[tuple[tuple, tuple[Tensor | None, ...], Plan]] = []
"""The last plans: two, so that a batch of validation in between costs nothing."""


def remembered() -> list[Plan]:
    """The plans in memory, the newest first."""
    return [plan for _, _, plan in _plans]


def forget() -> None:
    """Frees them."""
    _plans.clear()


def plan_for(request: Request) -> Plan:
    """The plan of a batch: that of the call before if it was about the same batch, else a new one."""
    scalars, tensors = request.scalars(), request.tensors()
    for known_scalars, known_tensors, plan in _plans:
        if known_scalars == scalars and all(map(_same, known_tensors, tensors)):
            return plan
    # Copies: the caller may write to its tensors afterwards, and what is compared must not change with them.
    # They are ordinary tensors even when the first call was made in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        copies = tuple(None if t is None else t.detach().clone() for t in tensors)
        q_offsets, kv_offsets, num_contextual, num_targets, query_times, key_times = copies
        mask = replace(request.mask, num_contextual=num_contextual, num_targets=num_targets)
        times = {"query_times": query_times, "key_times": key_times}
        plan = Plan(replace(request, q_offsets=q_offsets, kv_offsets=kv_offsets, mask=mask, **times))
    _plans[:] = [(scalars, copies, plan), *_plans[:1]]
    return plan


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def _mask_of(mask: Mask, rows: Tensor) -> Mask:
    """The mask of some rows."""
    counts = {name: getattr(mask, name) for name in ("num_contextual", "num_targets")}
    return replace(mask, **{name: None if count is None else count.long()[rows] for name, count in counts.items()})


def _groups(q_lengths: Tensor, k_lengths: Tensor, num_heads: int) -> list[Group]:
    """Rows by falling length; a group ends where its block would be too large, or too much of it padding.

    Rows without keys (and so without queries) are in no group.
    """
    order = torch.argsort(k_lengths, descending=True, stable=True)
    order = order[: int((k_lengths > 0).sum())]
    keys, queries = k_lengths[order].tolist(), q_lengths[order].tolist()
    groups: list[Group] = []
    first = q_start = k_start = 0
    while first < len(keys):
        width, height, waste, last = keys[first], queries[first], 0, first + 1
        while last < len(keys):
            taller = max(height, queries[last])
            waste += (taller * width - queries[last] * keys[last]) * num_heads
            block = (last - first + 1) * width * taller * num_heads
            if waste > CALL_SCORES or block > TILE_SCORES:
                break
            height, last = taller, last + 1
        groups.append(Group(order[first:last], height, width, q_start, k_start))
        q_start += (last - first) * height
        k_start += (last - first) * width
        first = last
    return groups


def _layout(lengths: Tensor, blocks: list[tuple[Tensor, int, int]], num_heads: int) -> Layout:
    """Where tokens of rows with these lengths go, for blocks of (rows, width, first slot)."""
    starts, widths = torch.zeros_like(lengths), torch.zeros_like(lengths)  # of each row's own stretch
    heads_start = torch.zeros_like(lengths)
    for rows, width, start in blocks:
        within = torch.arange(len(rows))
        starts[rows] = start + within * width
        heads_start[rows] = (start + within * width) * num_heads
        widths[rows] = width
    total = int(lengths.sum())
    row = torch.arange(lengths.shape[0]).repeat_interleave(lengths, output_size=total)
    index = torch.arange(total) - (lengths.cumsum(0) - lengths)[row]
    heads = torch.arange(num_heads)
    slots = ((heads_start[row] + index)[:, None] + heads * widths[row][:, None]).reshape(-1)
    sources = torch.full((num_heads * sum(len(rows) * width for rows, width, _ in blocks),), -1)
    sources[slots] = torch.arange(slots.shape[0])
    return Layout(starts[row] + index, slots, sources.clamp(min=0), (sources < 0).nonzero()[:, 0])
