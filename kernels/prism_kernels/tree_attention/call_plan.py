"""Tree attention as attention over sequences of any length: which queries meet which keys in which call.

Every call takes all keys, cut into sequences; a sequence of queries meets one of keys. Each pair that the tree allows
is in one call, no other pair is in any:

- a segment with itself, causal;
- per level of the tree, the queries below a segment of that level with all of its keys: branches that follow each other
  are one sequence, so that their root's keys are read once.

Where only some rows are queries, the first of these is cut further: their runs of consecutive rows cut the segment's
keys into stretches, a run is causal with its own stretch, and halves of halves of the runs meet the stretches before
them: ceil(log2(runs)) calls more. One row per segment, a read-out, is one run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.tree_attention.layout import TreeLayout


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequence i: rows [cu_q[i], cu_q[i + 1]) of the queries meet rows [cu_k[i], cu_k[i + 1]) of the keys.

    Both cover all rows; either may be empty. ``causal``: both end together, so that of n queries and m keys query j
    meets the first m - n + j + 1.
    """

    edges: list[tuple[int, int]]  # n + 1 pairs of cu_q and cu_k, on the host
    cu_q: Tensor  # (n + 1,) int32, on the device of the queries
    cu_k: Tensor  # (n + 1,) int32
    causal: bool

    @cached_property
    def max_q(self) -> int:
        """Queries of the longest."""
        return max(b[0] - a[0] for a, b in pairwise(self.edges))

    @cached_property
    def max_k(self) -> int:
        return max(b[1] - a[1] for a, b in pairwise(self.edges))


@dataclass(frozen=True)
class VarlenCall:
    sequences: Sequences
    query: Tensor | None  # (n,) int32: the rows of q that it takes, each at most once; None: all, where they lie


class _Meeting(NamedTuple):
    keys: range
    queries: list[range]  # positions in q
    causal: bool = False


def call_plan(layout: TreeLayout, query_row: Tensor | None, causal: bool) -> tuple[VarlenCall, ...]:
    """Computed once, used by every layer; of chosen rows (Q,), on the host, the last ones asked for are kept.

    Not ``causal``: every token sees all of its segment, and no segment continues another.
    """
    if query_row is None:
        return layout.kept(f"calls, causal {causal}", None, lambda: _plan(layout, None, causal))
    rows = tuple(query_row.tolist())
    return layout.kept("calls of rows", rows, lambda: _plan(layout, rows))


def _plan(layout: TreeLayout, chosen: tuple[int, ...] | None, causal: bool = True) -> tuple[VarlenCall, ...]:
    """``chosen``: the row of the stream that each query is; None: query i is row i."""
    own = _whole(layout, causal) if chosen is None else _stretches(layout, chosen)
    num_q = layout.num_tokens if chosen is None else len(chosen)
    stretches = [stretch for found in own.values() for stretch in found]
    together = [
        [stretch for stretch in stretches if stretch.causal],
        [stretch for stretch in stretches if not stretch.causal],
        *_halves(own),
        *_levels(layout, own),
    ]
    together = [met for met in together if met]
    calls = [_call(met, num_q, layout.num_tokens) for met in together]
    numbers = [row for edges, query in calls for row in (*map(list, zip(*edges)), query or [])]
    placed = iter(_placed(numbers, layout.segment_start.device))
    found = []
    for met, (edges, query) in zip(together, calls):
        cu_q, cu_k, rows = next(placed), next(placed), next(placed)
        found.append(VarlenCall(Sequences(edges, cu_q, cu_k, met[0].causal), None if query is None else rows))
    return tuple(found)


def _whole(layout: TreeLayout, causal: bool) -> dict[int, list[_Meeting]]:
    """{segment: itself}, of those that have tokens."""
    rows = {segment: layout.rows(segment) for segment in range(layout.num_segments)}
    return {segment: [_Meeting(own, [own], causal=causal)] for segment, own in rows.items() if own}


def _stretches(layout: TreeLayout, chosen: tuple[int, ...]) -> dict[int, list[_Meeting]]:
    """{segment: its keys up to the last chosen row, in stretches that each end with a run of consecutive chosen rows}.

    A row that is chosen several times ends a stretch of its own, which is not causal: all of its queries see all of it.
    """
    ends = [layout.rows(segment).stop for segment in range(layout.num_segments)]
    found: dict[int, list[_Meeting]] = {}
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    for row, same in groupby(order, key=chosen.__getitem__):
        segment = bisect_right(ends, row)
        before = found.setdefault(segment, [])
        start = before[-1].keys.stop if before else layout.rows(segment).start
        queries = _joined(range(i, i + 1) for i in same)
        alone = sum(map(len, queries)) == 1
        if alone and before and before[-1].causal and start == row:
            run = before.pop()
            start, queries = run.keys.start, _join(run.queries, queries[0])
        before.append(_Meeting(range(start, row + 1), queries, causal=alone))
    return found


def _halves(own: dict[int, list[_Meeting]]) -> Iterator[list[_Meeting]]:
    """Later stretches' queries with earlier stretches' keys of the same segment: neighbours, pairs of pairs, and on."""
    width, longest = 1, max(map(len, own.values()), default=0)
    while width < longest:
        met = []
        for stretches in own.values():
            for i in range(width, len(stretches), 2 * width):
                keys = range(stretches[i - width].keys.start, stretches[i - 1].keys.stop)
                met.append(_Meeting(keys, _queries(stretches[i : i + width])))
        yield met
        width *= 2


def _levels(layout: TreeLayout, own: dict[int, list[_Meeting]]) -> Iterator[list[_Meeting]]:
    """Per level, roots first: all queries below a segment of that level with all of its keys."""
    below: list[dict[int, list[_Meeting]]] = []  # per level, {segment: the stretches below it}
    for segment in sorted(own):
        for level, above in enumerate(layout.ancestors(segment)):
            below += [{} for _ in range(level + 1 - len(below))]
            below[level].setdefault(above, []).extend(own[segment])
    for segments in below:
        rows = {above: layout.rows(above) for above in segments}
        yield [_Meeting(rows[above], _queries(segments[above])) for above in segments if rows[above]]


def _queries(stretches: list[_Meeting]) -> list[range]:
    return _joined(run for stretch in stretches for run in stretch.queries)


def _joined(runs: Iterable[range]) -> list[range]:
    joined: list[range] = []
    for run in runs:
        _join(joined, run)
    return joined


def _join(runs: list[range], run: range) -> list[range]:
    """With one more, which becomes one with the last if it continues it."""
    if runs and runs[-1].stop == run.start:
        run = range(runs.pop().start, run.stop)
    runs.append(run)
    return runs


def _call(met: list[_Meeting], num_q: int, num_k: int) -> tuple[list[tuple[int, int]], list[int] | None]:
    """Where sequences start and end, and the rows that are queries. Keys of a call lie apart.

    Queries stay where they lie, rows None, if they lie apart too, in the order of their keys.
    """
    met = sorted(met, key=lambda meeting: meeting.keys.start)
    runs = [meeting.queries[0] for meeting in met]
    in_place = all(len(meeting.queries) == 1 for meeting in met)
    in_place = in_place and all(a.stop <= b.start for a, b in pairwise(runs))
    if not in_place:
        num_q = sum(len(run) for meeting in met for run in meeting.queries)
    edges = [(0, 0)]

    def cut(q: int, k: int) -> None:
        if (q, k) != edges[-1]:
            edges.append((q, k))

    def skip(q: int, k: int) -> None:
        """Queries without keys, then keys without queries."""
        cut(q, edges[-1][1])
        cut(q, k)

    for meeting in met:
        start = meeting.queries[0].start if in_place else edges[-1][0]
        skip(start, meeting.keys.start)
        cut(start + sum(map(len, meeting.queries)), meeting.keys.stop)
    skip(num_q, num_k)
    return edges, None if in_place else [i for meeting in met for run in meeting.queries for i in run]


def _placed(lists: list[list[int]], device: torch.device) -> list[Tensor]:
    """Each as int32 on the device: one copy, for which the host does not wait."""
    if not lists:
        return []
    host = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.int32, device="cpu")
    host = host.pin_memory() if device.type == "cuda" else host
    return list(host.to(device, non_blocking=True).split([len(numbers) for numbers in lists]))
