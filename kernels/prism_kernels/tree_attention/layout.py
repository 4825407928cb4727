"""TreeLayout: which segment continues which, and where each one lies in the packed stream.

S segments, T tokens. A segment is a run of tokens; it continues an earlier segment (its prefix) or starts a tree (-1).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from prism_kernels.checks import check_tensor, describe, items, shown, wrong

Plan = TypeVar("Plan")

# Segments of this many query-key pairs are a call of their own, which reads no padding.
LARGE_AREA = 16_384
# Smaller ones share a call, padded to the longest, while the padded area stays under this multiple of the exact one, or
# under that of a large one: a call costs more than the padding.
PADDING_LIMIT = 1.3


@dataclass(frozen=True)
class SegmentGroup:
    """Segments in one dense attention call: n segments, Lq queries, Lk keys, padded at their ends."""

    members: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]  # of every member the segments whose tokens are its keys: ancestors, then itself
    size: tuple[int, int, int]  # n, Lq, Lk
    mask: Tensor | None  # (n, 1, Lq, Lk) bool; None: plain causal
    aligned: bool  # nothing is padded: query i of every segment sees the first Lk - Lq + i + 1 keys


@dataclass(frozen=True)
class TreeRows:
    """The chosen queries of one tree, whose keys lie in stream rows [start, stop)."""

    query: Tensor  # (n,) int64: positions in the chosen rows
    start: int
    stop: int
    mask: Tensor  # (n, stop - start) bool


@dataclass(frozen=True)
class RowPlan:
    trees: tuple[TreeRows, ...]
    output_row: Tensor  # (Q,) int64: where the result of chosen row i lies in the concatenated outputs


@dataclass(frozen=True, eq=False)
class QueryRows:
    """Chosen rows of a stream, on a device and, for whoever plans, on the host: a plan then waits for no GPU.

    >>> QueryRows.build(torch.tensor([4, 5, 9])).to("cuda")
    """

    row: Tensor  # (Q,) int64, on any device, "meta" too
    host: Tensor  # (Q,) int64, the same on the host

    @classmethod
    def build(cls, row: Tensor) -> QueryRows:
        """``row`` (Q,) int64, on the host. Raises ValueError naming it."""
        check_tensor("row", row, {"Q": None}, (torch.int64,))
        if row.device.type != "cpu":
            raise wrong("row", "a tensor on the host, before it is moved", describe(row))
        return cls(row, row)

    def __len__(self) -> int:
        return len(self.host)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> QueryRows:
        return QueryRows(self.row.to(device, non_blocking=non_blocking), self.host)


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """Layout of a packed tree.

    >>> TreeLayout.build(lengths=[3, 2, 1, 2, 2], prefix=[-1, 0, 0, -1, 3]).segment_start.tolist()
    [0, 3, 5, 6, 8, 10]
    """

    lengths: tuple[int, ...]
    prefix: tuple[int, ...]
    segment_start: Tensor  # (S + 1,) int32
    segments: Tensor  # (2, S) int32, on the host: lengths and prefix, as operators take them
    num_tokens: int
    flat: bool  # no segment continues another
    _cache: dict = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls, lengths: Sequence[int], prefix: Sequence[int], device: torch.device | str | None = None
    ) -> TreeLayout:
        """Layout of segments in stream order.

        ``lengths``: tokens per segment, >= 0. ``prefix[i]``: index of the segment that i continues (< i), or -1.
        Raises ValueError naming the argument and the segment.
        """
        lengths, prefix = _integers("lengths", lengths), _integers("prefix", prefix)
        if len(lengths) != len(prefix):
            raise wrong("prefix", f"as many entries as lengths ({len(lengths)})", str(len(prefix)))
        for i, (length, parent) in enumerate(zip(lengths, prefix)):
            if length < 0:
                raise wrong(f"lengths[{i}]", "a number of tokens >= 0", str(length))
            if not -1 <= parent < i:
                raise wrong(f"prefix[{i}]", f"-1 or the index of an earlier segment (< {i})", str(parent))
        total = sum(lengths)
        if total >= 1 << 31:
            raise wrong("lengths", "fewer than 2^31 tokens", f"{total} in all")
        try:
            where = torch.device("cpu" if device is None else device)
            start = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
            start = start.to(where, non_blocking=True)
        except (TypeError, RuntimeError):
            raise wrong("device", "a device of this machine", shown(device)) from None
        segments = torch.tensor([lengths, prefix], dtype=torch.int32, device="cpu")
        return cls(lengths, prefix, start, segments, total, max(prefix, default=-1) < 0)

    @property
    def num_segments(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TreeLayout:
        if torch.device(device) == self.segment_start.device:
            return self
        start = self.segment_start.to(device, non_blocking=non_blocking)
        return TreeLayout(self.lengths, self.prefix, start, self.segments, self.num_tokens, self.flat)

    def ancestors(self, segment: int) -> list[int]:
        """Segments from the root down to the parent of ``segment``; empty for a root."""
        path = []
        parent = self.prefix[segment]
        while parent >= 0:
            path.append(parent)
            parent = self.prefix[parent]
        return path[::-1]

    def rows(self, segment: int) -> range:
        """Rows of the stream that the segment occupies."""
        starts = self._cache.get("starts")
        if starts is None:
            starts = self._cache["starts"] = [0, *accumulate(self.lengths)]  # segment_start may be on a GPU
        return range(starts[segment], starts[segment + 1])

    def allowed(self) -> Tensor:
        """(T, T) bool: query row may attend to key row. Quadratic: for the reference and for tests."""
        mask = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool)
        for segment in range(self.num_segments):
            own = self.rows(segment)
            for parent in self.ancestors(segment):
                above = self.rows(parent)
                mask[own.start : own.stop, above.start : above.stop] = True
            mask[own.start : own.stop, own.start : own.stop] = torch.ones(len(own), len(own)).tril().bool()
        return mask.to(self.segment_start.device)

    def groups(self) -> tuple[SegmentGroup, ...]:
        """All segments that have tokens, for dense attention; computed once, used by every layer."""
        return self.kept("groups", None, lambda: _groups(self))

    def row_plan(self, query_row: Tensor) -> RowPlan:
        """Chosen query rows, on the host, by tree, for attention at a few rows; the last one asked for is kept."""
        rows = tuple(query_row.tolist())
        return self.kept("row_plan", rows, lambda: _row_plan(self, rows))

    def kept(self, name: str, of: Hashable, make: Callable[[], Plan]) -> Plan:
        """A plan by its name: what ``make`` gave, for as long as it is asked for ``of`` the same."""
        if name not in self._cache or self._cache[name][0] != of:
            self._cache[name] = of, make()
        return self._cache[name][1]


def layout_of(segments: Tensor, device: torch.device) -> TreeLayout:
    """The layout of these ``segments``, with plans on this device: for operators, which know no TreeLayout.

    It keeps its plans, which every layer of a step asks for. Layouts are told apart by the bytes of ``segments``:
    tuples of thousands of integers are no key that is cheap to make and to hash.
    """
    content = segments.contiguous()
    return _layout_of(ctypes.string_at(content.data_ptr(), content.nbytes), segments.shape[1], device)


@lru_cache(maxsize=8)
def _layout_of(content: bytes, count: int, device: torch.device) -> TreeLayout:
    numbers = memoryview(content).cast("i").tolist()
    return TreeLayout.build(numbers[:count], numbers[count:], device)


def _integers(name: str, values: Sequence[int] | Tensor) -> tuple[int, ...]:
    given = items(name, values, "a sequence of integers")
    try:
        result = tuple(int(v) for v in given)
    except (TypeError, ValueError, OverflowError):
        raise wrong(name, "a sequence of integers", shown(given)) from None
    if any(r != v for r, v in zip(result, given)):
        raise wrong(name, "whole numbers", shown(given))
    return result


def _groups(layout: TreeLayout) -> tuple[SegmentGroup, ...]:
    device, found = layout.segment_start.device, []
    num_q = layout.lengths
    paths = [(*layout.ancestors(s), s) for s in range(layout.num_segments)]
    num_k = [sum(num_q[s] for s in path) for path in paths]
    order = sorted((s for s in range(layout.num_segments) if num_q[s]), key=lambda s: (num_k[s], num_q[s]))
    for members in _similar(order, num_q, num_k):
        longest_q, longest_k = max(num_q[s] for s in members), max(num_k[s] for s in members)
        before, mask = [num_k[s] - num_q[s] for s in members], None
        if any(before):
            # Query i of a segment sees key j when j <= (tokens above the segment) + i; padded keys come later.
            last = torch.tensor(before)[:, None] + torch.arange(longest_q)
            mask = (torch.arange(longest_k) <= last[:, :, None])[:, None].to(device)
        size = (len(members), longest_q, longest_k)
        aligned = all((num_q[s], num_k[s]) == (longest_q, longest_k) for s in members)
        found.append(SegmentGroup(tuple(members), tuple(paths[s] for s in members), size, mask, aligned))
    return tuple(found)


def _row_plan(layout: TreeLayout, chosen: tuple[int, ...]) -> RowPlan:
    device = layout.segment_start.device
    root, extent, segment_of = [], {}, []
    for segment, parent in enumerate(layout.prefix):
        root.append(segment if parent < 0 else root[parent])
        rows = layout.rows(segment)
        start, _ = extent.get(root[-1], (rows.start, rows.stop))
        extent[root[-1]] = (start, rows.stop)  # the stream's order is the segments' order
        segment_of += [segment] * len(rows)
    members: dict[int, list[int]] = {}
    for i, row in enumerate(chosen):
        if not 0 <= row < layout.num_tokens:
            raise wrong(f"query_row[{i}]", f"a row of the {layout.num_tokens} tokens", str(row))
        members.setdefault(root[segment_of[row]], []).append(i)
    trees, output_row, offset = [], [0] * len(chosen), 0
    for tree, queries in members.items():
        start, stop = extent[tree]
        mask = torch.zeros(len(queries), stop - start, dtype=torch.bool)
        for j, i in enumerate(queries):
            segment = segment_of[chosen[i]]
            for above in layout.ancestors(segment):
                rows = layout.rows(above)
                mask[j, rows.start - start : rows.stop - start] = True
            mask[j, layout.rows(segment).start - start : chosen[i] - start + 1] = True
            output_row[i] = offset + j
        offset += len(queries)
        trees.append(TreeRows(torch.tensor(queries, device=device), start, stop, mask.to(device)))
    return RowPlan(tuple(trees), torch.tensor(output_row, dtype=torch.int64, device=device))


def _similar(order: list[int], num_q: Sequence[int], num_k: Sequence[int]) -> list[list[int]]:
    """Cuts segments sorted by size into groups: large ones alone, small ones padded little, or to little."""
    groups: list[list[int]] = []
    exact, longest_q, alone = 0, 0, False
    for s in order:
        area, longest_q = num_q[s] * num_k[s], max(longest_q, num_q[s])
        group = groups[-1] if groups else []
        padded = (len(group) + 1) * longest_q * num_k[s]
        # Roots (all keys are their own) and branches stay apart, so that roots keep the plain causal path.
        mixed = bool(group) and (num_q[s] == num_k[s]) != (num_q[group[0]] == num_k[group[0]])
        too_much = padded > max(PADDING_LIMIT * (exact + area), LARGE_AREA)
        if not group or mixed or too_much or alone or area >= LARGE_AREA:
            groups.append([s])
            exact, longest_q, alone = area, num_q[s], area >= LARGE_AREA
        else:
            group.append(s)
            exact += area
    return groups
