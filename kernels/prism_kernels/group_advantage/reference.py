"""The definition: a loop over groups in float64, plain torch, any device.

Dimensions: B responses, K rewards, n responses of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.group_advantage.rules import Coefficients


def group_normalize(scores: Tensor, group_ids: Tensor, *, baseline: str, scale: str, eps: float) -> Tensor:
    """(B,) or (K, B) -> the same shape, float64."""
    scores = scores.double()
    out = torch.empty_like(scores)
    for group in group_ids.unique():
        rows = (group_ids == group).nonzero().squeeze(1)
        out[..., rows] = _normalize_one_group(scores[..., rows], baseline, scale, eps)
    return out


def _normalize_one_group(scores: Tensor, baseline: str, scale: str, eps: float) -> Tensor:
    """(..., n) -> (..., n)."""
    n = scores.shape[-1]
    if n == 1:  # baseline 0, std 1
        return scores / (1.0 + eps) if scale == "std" else scores
    shifted = scores - scores[..., :1]  # so that equal scores give exactly 0
    centred = shifted - shifted.mean(dim=-1, keepdim=True)
    std = (centred.square().sum(dim=-1, keepdim=True) / (n - 1)).sqrt()
    if baseline == "leave_one_out":  # s - mean of the others = (s - mean of all) * n / (n - 1)
        centred = centred * (n / (n - 1))
    if scale == "none":
        return centred
    denominator = std + eps  # 0 for equal scores and eps 0: they are 0 then too
    return centred / torch.where(denominator == 0, 1.0, denominator)


def multi_reward_advantage(
    perception: Tensor,
    reasoning: Tensor,
    group_ids: Tensor,
    format_valid: Tensor | None,
    accuracy: Tensor | None,
    *,
    rule: str,
    coefficients: Coefficients,
) -> Tensor:
    """(B,) each -> (B,) float64; the table of docs/method.md 4 and of the public docstring."""
    c = coefficients
    valid = torch.ones_like(group_ids, dtype=torch.bool) if format_valid is None else format_valid != 0
    scores = torch.stack([perception.double(), reasoning.double()])
    for group in group_ids.unique():
        member = group_ids == group
        scored = scores[:, member & valid]
        lowest = scored.amin(dim=1, keepdim=True) - 1.0 if scored.shape[1] else scores.new_full((2, 1), -1.0)
        scores = torch.where(member & ~valid, lowest, scores)

    def normalize(x: Tensor) -> Tensor:
        return group_normalize(x, group_ids, baseline="mean", scale="std", eps=c.eps)

    z = normalize(scores)
    align = c.perception_weight * z[0] + c.reasoning_weight * z[1]
    invalid = (~valid).double()  # F
    if rule == "align":
        return align - c.format_penalty * invalid

    accuracy = accuracy.double()
    wrong = (valid & (accuracy == 0)).double()  # W
    gate = (1 - invalid) * (1 - wrong)
    align = c.align_coef * align
    earned = c.accuracy_weight * accuracy + c.format_weight * valid.double()
    penalty = c.wrong_penalty * wrong + c.format_penalty * invalid
    if rule == "penalised":
        return align - penalty
    if rule == "gated":
        return align * gate - penalty
    if rule == "verified":
        return normalize(earned) + align * gate
    if rule == "verified_penalised":
        return normalize(earned - penalty) + align * gate
    if rule == "signed":
        reward = (1 - invalid) * (earned - c.wrong_penalty * wrong) - c.format_penalty * invalid
        return normalize(reward) + align * (1 - invalid) * (1 - 2 * wrong)
    raise ValueError(f"rule: got {rule!r}")
