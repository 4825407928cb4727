"""The definition: a loop over groups in float64, plain torch, any device.

Dimensions: B responses, K rewards, n responses of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.group_advantage.rules import Coefficients, Responses, Rule


def group_normalize(
    scores: Tensor, group_ids: Tensor, *, baseline: str, scale: str, eps: float, min_std: float = 0.0
) -> Tensor:
    """(B,) or (K, B) -> the same shape, float64."""
    scores = scores.double()
    out = torch.empty_like(scores)
    for group in group_ids.unique():
        rows = (group_ids == group).nonzero().squeeze(1)
        out[..., rows] = _normalize_one_group(scores[..., rows], baseline, scale, eps, min_std)
    return out


def _normalize_one_group(scores: Tensor, baseline: str, scale: str, eps: float, min_std: float) -> Tensor:
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
    denominator = std.clamp(min=min_std) + eps  # 0 for equal scores and eps 0: they are 0 then too
    return centred / torch.where(denominator == 0, 1.0, denominator)


def multi_reward_advantage(responses: Responses, rule: Rule, coefficients: Coefficients) -> Tensor:
    """(B,) each -> (B,) float64; the formula of rules.py and of docs/method.md 4."""
    perception, reasoning, group_ids, format_valid, accuracy = responses
    c = coefficients
    valid = torch.ones_like(group_ids, dtype=torch.bool) if format_valid is None else format_valid != 0
    scores = torch.stack([perception.double(), reasoning.double()])
    for group in group_ids.unique():
        member = group_ids == group
        scored = scores[:, member & valid]
        lowest = scored.amin(dim=1, keepdim=True) - 1.0 if scored.shape[1] else scores.new_full((2, 1), -1.0)
        scores = torch.where(member & ~valid, lowest, scores)

    def normalize(x: Tensor, min_std: float = 0.0) -> Tensor:
        return group_normalize(x, group_ids, baseline="mean", scale="std", eps=c.eps, min_std=min_std)

    invalid = (~valid).double()  # F
    wrong = torch.zeros_like(invalid) if accuracy is None else (valid & (accuracy == 0)).double()  # W
    right = 1 - invalid - wrong

    def amount(multiples: tuple[float, float]) -> Tensor:
        return multiples[0] * c.wrong_penalty * wrong + multiples[1] * c.format_penalty * invalid

    z = normalize(scores, c.min_std)
    align = c.perception_weight * z[0] + c.reasoning_weight * z[1]
    if rule.scaled:
        align = c.align_coef * align
    gate = rule.gate[0] * right + rule.gate[1] * wrong + rule.gate[2] * invalid
    advantage = align * gate - amount(rule.penalty)
    if accuracy is not None:  # NaN and infinite ones show
        advantage = advantage + torch.where(valid, accuracy.double() - accuracy.double(), 0.0)
    if rule.reward is not None:
        assert accuracy is not None  # such a rule reads it
        earned = c.accuracy_weight * accuracy.double() + c.format_weight * valid.double()  # r
        share = right + wrong + rule.reward.invalid * invalid
        advantage = normalize(share * earned - amount(rule.reward.fine)) + advantage
    return advantage
