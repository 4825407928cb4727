"""FlashAttention's two calls on a CPU, by what callers must respect and what they give back, as read in torch 2.13.

Plain torch computes; the contract is FlashAttention's: results in the dtype of q, gradients of grouped keys rounded for
every query head and then their sum, log-sum-exps of +inf (version 2) or -inf (3) where there is no key or only NaN.
"""

from itertools import pairwise

import torch

from prism_kernels.tree_attention.call_plan import Sequences
from prism_kernels.tree_attention.varlen_library import TorchVarlen


class FakeFlash:
    """``forward`` and ``backward`` have the arguments of aten's; ``calls``: the causal flag of each forward."""

    def __init__(self, nothing=float("inf")):
        self.nothing, self.calls = nothing, []

    def forward(self, query, key, value, *given, scale=None):
        *cu_and_longest, dropout_p, is_causal, return_debug_mask = given
        sequences = _checked((query, key, value), *cu_and_longest, is_causal, scale)
        assert dropout_p == 0 and return_debug_mask is False
        assert cu_and_longest[2] > 1 or query.shape[1] == key.shape[1], "it would count one query for each sequence"
        self.calls.append(is_causal)
        out, lse = TorchVarlen().forward(query, key, value, sequences, scale)
        lse = lse.masked_fill(lse.isneginf() | lse.isnan() | out.isnan().any(-1).T, self.nothing)
        return out.to(query.dtype), lse, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(self, grad_out, query, key, value, out, logsumexp, *given, scale=None):
        *cu_and_longest, dropout_p, is_causal, rng_state, unused = given
        sequences = _checked((query, key, value), *cu_and_longest, is_causal, scale)
        assert (grad_out.dtype, grad_out.shape) == (out.dtype, out.shape) == (query.dtype, query.shape)
        assert grad_out.stride(-1) == out.stride(-1) == 1 and logsumexp.is_contiguous()
        assert logsumexp.shape == (query.shape[1], query.shape[0]) and dropout_p == 0
        assert not logsumexp.isposinf().any() and rng_state.numel() == 2 and unused.numel() == 0
        groups = query.shape[1] // key.shape[1]
        spread = [x.repeat_interleave(groups, 1) for x in (key, value)]
        d_q, *d_kv = TorchVarlen().backward(grad_out, query, *spread, out, logsumexp, sequences, scale)
        d_k, d_v = (x.to(key.dtype).unflatten(1, (key.shape[1], groups)).sum(2, dtype=logsumexp.dtype) for x in d_kv)
        return d_q.to(query.dtype), d_k.to(key.dtype), d_v.to(key.dtype)


def _checked(tensors, cu_q, cu_k, max_q, max_k, causal, scale):
    q, k, v = tensors
    assert q.dtype == k.dtype == v.dtype and k.shape == v.shape and q.shape[2] == k.shape[2]
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256 and q.shape[1] % k.shape[1] == 0
    for x in tensors:
        assert x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    assert scale > 0
    for cu, x, longest in ((cu_q, q, max_q), (cu_k, k, max_k)):
        lengths = [b - a for a, b in pairwise(cu.tolist())]
        assert cu.dtype == torch.int32 and cu.is_contiguous() and lengths, "the batch must be positive"
        assert cu[0] == 0 and cu[-1] == len(x) and min(lengths) >= 0 and max(lengths) <= longest
    return Sequences(list(zip(cu_q.tolist(), cu_k.tolist())), cu_q, cu_k, causal)
