"""Inputs of the tree-attention benchmark, the pairs that it counts, and its truth in float64, segment by segment.

T tokens, S segments, Q read-out rows, Hq and Hkv heads of D. A pack holds trees of a root and branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.harness.lengths import factors, scaled
from benchmarks.harness.measure import DTYPES
from benchmarks.harness.op import Outputs, Shape
from prism_kernels import TreeLayout

GRADIENTS = ("dq", "dk", "dv")


@dataclass
class Pack:
    """``query_row``: the rows whose attention is wanted; None: all, and then Q is T."""

    layout: TreeLayout
    q: Tensor  # (Q, Hq, D), wants a gradient, as do k and v
    k: Tensor  # (T, Hkv, D)
    v: Tensor
    d_out: Tensor  # as q
    query_row: Tensor | None = None  # (Q,) int64

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v]

    @property
    def device(self) -> torch.device:
        return self.q.device

    @cached_property
    def start(self) -> list[int]:
        """(S + 1,): where segments begin."""
        return self.layout.segment_start.tolist()

    def own(self, segment: int) -> range:
        """Its rows of the stream."""
        return range(self.start[segment], self.start[segment + 1])

    def keys(self, segment: int) -> list[int]:
        """Rows that the segment's last token sees: of its root, then its own."""
        root = self.layout.prefix[segment]
        return [*(self.own(root) if root >= 0 else ()), *self.own(segment)]

    @cached_property
    def pairs(self) -> int:
        """Visited pairs of a query and a key, exactly."""
        count = 0
        for segment, root in enumerate(self.layout.prefix):
            above, own = len(self.own(root)) if root >= 0 else 0, len(self.own(segment))
            if self.query_row is None:
                count += own * above + own * (own + 1) // 2
            elif root >= 0:  # its last row
                count += above + own
        return count

    @cached_property
    def terms(self) -> int:
        """Of the longest sum: over the keys of a row, or over the rows that see a root's key."""
        seen = dict.fromkeys(range(self.layout.num_segments), 0)
        for segment, root in enumerate(self.layout.prefix):
            for key in {root, segment} - {-1}:
                seen[key] += len(self.own(segment))
        return max(*seen.values(), *(len(self.keys(segment)) for segment in seen)) + self.q.shape[-1]

    def gradients(self, out: Tensor) -> Outputs:
        return {"out": out.detach(), **dict(zip(GRADIENTS, torch.autograd.grad(out, self.leaves, self.d_out)))}


def make_pack(shape: Shape, device: torch.device, seed: int = 0) -> Pack:
    """Prompts of mean length P, or where it is 0 as long as all branches of their tree together; branches of the mean
    lengths that L names in turn, as "250+700". Both log-normal."""
    host = torch.Generator().manual_seed(seed)
    means = [int(mean) for mean in shape["L"].split("+")]
    lengths: list[int] = []
    prefix: list[int] = []
    for _ in range(shape["trees"]):
        prompt, *ragged = factors(1 + shape["branches"], shape["sigma"], host)
        branches = [scaled(means[i % len(means)], factor) for i, factor in enumerate(ragged)]
        prefix += [-1, *[len(lengths)] * len(branches)]
        lengths += [scaled(shape["P"], prompt) if shape["P"] else sum(branches), *branches]
    layout = TreeLayout.build(lengths, prefix, device=device)
    random = torch.Generator(device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        made = torch.randn(layout.num_tokens, heads, shape["D"], generator=random, device=device)
        return made.to(DTYPES[shape["dtype"]])

    q, k, v, d_out = (normal(shape[heads]) for heads in ("Hq", "Hkv", "Hkv", "Hq"))
    return Pack(layout, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out)


def read_out(pack: Pack) -> Pack:
    """The same, of which the last row of every branch is wanted."""
    last = [pack.start[s + 1] - 1 for s, root in enumerate(pack.layout.prefix) if root >= 0]
    rows = torch.tensor(last, device=pack.device)
    q, d_out = (x.detach()[rows] for x in (pack.q, pack.d_out))
    return Pack(pack.layout, q.requires_grad_(), pack.k, pack.v, d_out, rows)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Eager: (heads, n, D), and (1 or heads, m, D) twice -> (heads, n, D); the last query sees all keys, the one before
    it one less."""
    rows, keys = q.shape[1], k.shape[1]
    seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def truth(pack: Pack, *, backward: bool) -> Outputs:
    """float64 {"out"}, and backward {"dq", "dk", "dv"}; one segment and one key's head at a time."""
    q, k, v, d_out = (x.detach() for x in (*pack.leaves, pack.d_out))
    group = q.shape[1] // k.shape[1]
    found = {"out": torch.empty_like(q, dtype=torch.float64)}
    if backward:
        found |= {name: torch.zeros_like(x, dtype=torch.float64) for name, x in zip(GRADIENTS, (q, k, v))}
    place = range(len(q)) if pack.query_row is None else pack.query_row.tolist()
    query_of = {row: i for i, row in enumerate(place)}
    for segment in range(pack.layout.num_segments):
        queries = [query_of[row] for row in pack.own(segment) if row in query_of]
        if not queries:
            continue
        keys = torch.tensor(pack.keys(segment), device=pack.device)
        mine = torch.tensor(queries, device=pack.device)
        for head in range(k.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            leaves = [
                q[mine, heads].transpose(0, 1).double().requires_grad_(),
                *(x[keys, head][None].double().requires_grad_() for x in (k, v)),
            ]
            out = attend(*leaves)
            found["out"][mine, heads] = out.detach().transpose(0, 1)
            if backward:
                dq, dk, dv = torch.autograd.grad(out, leaves, d_out[mine, heads].transpose(0, 1).double())
                found["dq"][mine, heads] = dq.transpose(0, 1)
                found["dk"][:, head].index_add_(0, keys, dk[0])
                found["dv"][:, head].index_add_(0, keys, dv[0])
    return found
