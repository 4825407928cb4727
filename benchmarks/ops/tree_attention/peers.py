"""Other ways to the same attention, on tensors of their own form, and the library's varlen calls as a limit.

What turns the tree's tensors into a peer's, and its results into the tree's, is not timed: repeated prompts are given
and block masks made, as a step would have them once for all layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.measure import Unavailable
from benchmarks.harness.op import Call, Contender, Outputs
from benchmarks.harness.peers import need_gpu
from benchmarks.ops.tree_attention.data import GRADIENTS, Pack, attend

SEPARATE = "separate sequences, SDPA"
EAGER = "separate sequences, torch eager"
REPEATED = "flash varlen, repeated prompts"
FLEX = "FlexAttention, block mask"
LIBRARY = "library varlen, same pairs"


class Separate:
    """Every branch with its root before it, as a sequence of its own: q, k, v and d_out of all, one after the other.

    A root's rows are there once a branch; the gradient of its output goes into its first copy, so that gradients add up
    to the tree's.
    """

    def __init__(self, pack: Pack):
        self.pack = pack
        branches = [s for s, root in enumerate(pack.layout.prefix) if root >= 0]
        row = [torch.tensor(pack.keys(s), device=pack.device) for s in branches]
        self.lengths = [len(rows) for rows in row]
        self.row = torch.cat(row)  # (N,) of the stream
        self.k, self.v = (x.detach()[self.row].requires_grad_() for x in (pack.k, pack.v))
        if pack.query_row is not None:
            self.query, self.query_lengths = torch.arange(len(pack.q), device=pack.device), [1] * len(branches)
            self.d_out = pack.d_out
        else:
            self.query, self.query_lengths = self.row, self.lengths
            known = torch.zeros(len(pack.q), dtype=torch.bool, device=pack.device)
            first = torch.ones(len(self.row), dtype=torch.bool, device=pack.device)
            offset = 0
            for rows in row:
                first[offset : offset + len(rows)] = ~known[rows]
                known[rows] = True
                offset += len(rows)
            self.d_out = pack.d_out[self.row] * first[:, None, None]
        self.q = pack.q.detach()[self.query].requires_grad_()

    def each(self) -> list[tuple[Tensor, ...]]:
        """(q, k, v) of every sequence, (1, heads, n, D)."""
        lengths = (self.query_lengths, self.lengths, self.lengths)
        parts = [x.split(sizes) for x, sizes in zip((self.q, self.k, self.v), lengths)]
        return [tuple(x.transpose(0, 1)[None] for x in some) for some in zip(*parts)]

    def call(self, forward: Callable[[], Tensor], backward: bool) -> Call:
        """Of a forward -> (N, Hq, D)."""

        def both() -> Outputs:
            out = forward()
            return {"out": out.detach(), **dict(zip(GRADIENTS, self.gradients(out)))}

        return both if backward else torch.no_grad()(lambda: {"out": forward()})

    def gradients(self, out: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(out, [self.q, self.k, self.v], self.d_out)

    def folded(self, outputs: Outputs) -> Outputs:
        """A tree's outputs out of those of all sequences; gradients of copies add up."""
        wide = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in outputs.items()}
        found = {"out": torch.zeros_like(self.pack.q, dtype=wide["out"].dtype).index_copy(0, self.query, wide["out"])}
        for name, leaf, row in zip(GRADIENTS, self.pack.leaves, (self.query, self.row, self.row)):
            if name in wide:
                found[name] = torch.zeros_like(leaf, dtype=wide[name].dtype).index_add(0, row, wide[name])
        return found


def separate(pack: Pack, name: str, backward: bool) -> Contender:
    """Every sequence by itself, by torch's fused attention or eagerly."""
    made: list[Separate] = []

    def prepare() -> Call:
        sequences = Separate(pack)
        made[:] = [sequences]
        one = _sdpa if name == SEPARATE else _eager

        def forward() -> Tensor:
            return torch.cat([one(*parts)[0].transpose(0, 1) for parts in sequences.each()])

        return sequences.call(forward, backward)

    return Contender(name, prepare, compared=lambda outputs: made[0].folded(outputs))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = (x[0].repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
    return attend(q[0], keys, values)[None]


def repeated(pack: Pack, backward: bool) -> Contender:
    """The library's varlen attention on all sequences at once."""
    made: list[Separate] = []

    def prepare() -> Call:
        need_varlen(pack)
        sequences = Separate(pack)
        made[:] = [sequences]
        starts = [_starts(sizes, pack.device) for sizes in (sequences.query_lengths, sequences.lengths)]
        most = [max(sizes) for sizes in (sequences.query_lengths, sequences.lengths)]
        given = (sequences.q, sequences.k, sequences.v, *starts, *most)
        return sequences.call(lambda: varlen(*given, causal=pack.query_row is None), backward)

    return Contender(REPEATED, prepare, compared=lambda outputs: made[0].folded(outputs))


def library(pack: Pack, backward: bool) -> Contender:
    """The pairs of the tree by two calls of the library that nothing merges: every segment causal on itself, and all
    branches of a tree against their root."""

    def prepare() -> Call:
        need_varlen(pack)
        roots = [s for s, root in enumerate(pack.layout.prefix) if root < 0]
        tree = [sum(pack.layout.lengths[s] for s, root in enumerate(pack.layout.prefix) if root == r) for r in roots]
        is_root = torch.tensor([root < 0 for root in pack.layout.prefix], device=pack.device)
        lengths = torch.tensor(pack.layout.lengths, device=pack.device)
        of_root = is_root.repeat_interleave(lengths)
        q, d_out = (x.detach()[~of_root].requires_grad_() for x in (pack.q, pack.d_out))
        k, v = (x.detach()[of_root].requires_grad_() for x in (pack.k, pack.v))
        above = [pack.layout.lengths[r] for r in roots]
        own = (pack.layout.segment_start, pack.layout.segment_start, *[max(pack.layout.lengths)] * 2)
        cuts = (_starts(tree, pack.device), _starts(above, pack.device), max(tree), max(above))

        def call() -> Outputs:
            inside = varlen(*pack.leaves, *own, causal=True)
            across = varlen(q, k, v, *cuts, causal=False)
            if backward:
                torch.autograd.grad(inside, pack.leaves, pack.d_out)
                torch.autograd.grad(across, [q, k, v], d_out.detach())
            return {}

        return call if backward else torch.no_grad()(call)

    return Contender(LIBRARY, prepare, "limit")


def need_varlen(pack: Pack) -> None:
    """Raises Unavailable where the library has no variable-length attention for such tensors."""
    need_gpu(pack.device)
    if pack.q.dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable("FlashAttention takes bf16 and fp16")


def varlen(q: Tensor, k: Tensor, v: Tensor, *cuts: Tensor | int, causal: bool) -> Tensor:
    """torch's own FlashAttention; ``cuts``: where sequences of queries and of keys start, and the longest of both."""
    return torch.ops.aten._flash_attention_forward(q, k, v, *cuts, 0.0, causal, False)[0]


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def flex(pack: Pack, backward: bool) -> Contender:
    """torch's FlexAttention, compiled; ``extra``: seconds of its block mask, which a step needs once."""
    took: dict[str, float] = {}

    def prepare() -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if backward and pack.device.type != "cuda":
            raise Unavailable("needs a GPU: on a CPU FlexAttention has no backward")
        lengths = torch.tensor(pack.layout.lengths, device=pack.device)
        number = torch.arange(pack.layout.num_segments, device=pack.device)
        prefix = torch.tensor(pack.layout.prefix, device=pack.device)
        segment = number.repeat_interleave(lengths)  # (T,)
        root = torch.where(prefix < 0, number, prefix)[segment]
        rows = torch.arange(len(segment), device=pack.device) if pack.query_row is None else pack.query_row

        def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = rows[query]
            return (key <= row) & ((segment[key] == segment[row]) | (segment[key] == root[row]))

        for _ in range(2):  # the first one loads and warms what the second finds
            began = time.perf_counter()
            mask = create_block_mask(allowed, None, None, len(rows), len(segment), device=pack.device)
            if pack.device.type == "cuda":
                torch.cuda.synchronize()
            took["block_mask_s"] = time.perf_counter() - began
        run = torch.compile(flex_attention, dynamic=True)

        inputs = pack.leaves if backward else [x.detach() for x in pack.leaves]  # it asks no_grad nothing

        def forward() -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in inputs)
            return run(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        return (lambda: pack.gradients(forward())) if backward else torch.no_grad()(lambda: {"out": forward()})

    return Contender(FLEX, prepare, extra=lambda: took, compiles=True)
