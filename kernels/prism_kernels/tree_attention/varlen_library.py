"""Plain torch's answer to library.py, on any device: no more than a block of scores at once, and no waiting for a GPU.

Dimensions: N queries, T keys, Hq = Hkv * rep heads of D.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from prism_kernels.tree_attention.call_plan import Sequences
from prism_kernels.tree_attention.grouped_heads import as_rows, grouped, of_group

BLOCK = 1 << 22  # scores of all heads that are there at once


class TorchVarlen:
    """Plain torch, at least fp32 inside and out; sequence by sequence, blocks of queries at a time."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide, device=q.device)
        for rows, keys, scores in _blocks(q, k, sequences, scale):
            total = scores.logsumexp(-1, keepdim=True)
            weight = (scores - total.masked_fill(total == float("-inf"), 0)).exp()
            out[rows] = as_rows(weight @ of_group(v[keys]).to(wide))
            lse[:, rows] = total[..., 0].flatten(0, 1)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = lse.dtype
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        delta = (dout.to(wide) * out).sum(-1).T  # (Hq, N)
        for rows, keys, scores in _blocks(q, k, sequences, scale):
            total, kept = (x[:, rows].view(*scores.shape[:3], 1) for x in (lse, delta))
            weight = (scores - total).exp()  # (Hkv, rep, n, m)
            upstream = grouped(dout[rows], k).to(wide)
            d_scores = weight * (upstream @ of_group(v[keys]).to(wide).mT - kept) * scale
            dq[rows] = as_rows(d_scores @ of_group(k[keys]).to(wide))
            dk[keys] += (d_scores.mT @ grouped(q[rows], k).to(wide)).sum(1).transpose(0, 1)
            dv[keys] += (weight.mT @ upstream).sum(1).transpose(0, 1)
        return dq, dk, dv


def _blocks(q: Tensor, k: Tensor, sequences: Sequences, scale: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of q, rows of k, and their scores (Hkv, rep, n, m), -inf where causality hides a key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    for (start, first), (stop, last) in pairwise(sequences.edges):
        size = max(1, BLOCK // max(1, q.shape[1] * (last - first)))
        for row in range(start, stop, size):
            rows = slice(row, min(row + size, stop))
            behind = last - stop + rows.stop if sequences.causal else last  # of the keys that the last row sees
            keys = slice(first, behind)
            if behind <= first:
                continue
            scores = grouped(q[rows], k).to(wide) @ of_group(k[keys]).to(wide).mT * scale
            if sequences.causal:
                num_q, num_k = scores.shape[-2:]
                hidden = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device).triu(num_k - num_q + 1)
                scores = scores.masked_fill(hidden, float("-inf"))
            yield rows, keys, scores
