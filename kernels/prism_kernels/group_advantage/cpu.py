"""Every group at once on a CPU: rows sorted by group, float64 segment reductions.

NumPy, and ``take`` rather than fancy indexing: at these sizes the cost is that of the calls, not of the arithmetic.

Dimensions: B responses, K rewards, G groups. A response's row is sorted by (group, original position).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prism_kernels.group_advantage.rules import Coefficients, Responses, Rule


class _Groups(NamedTuple):
    order: np.ndarray | None  # (B,) sorted row -> response; None: the input is sorted already
    start: np.ndarray  # (G,) first row
    size: np.ndarray  # (G,) float64
    of_row: np.ndarray  # (B,) group number of a row


def group_normalize(scores: Tensor, group_ids: Tensor, *, baseline: str, scale: str, eps: float) -> Tensor:
    groups = _find_groups(group_ids)
    rows = np.atleast_2d(_sort(scores.double().numpy(force=True), groups))
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinite scores are data here
        out = _normalize(rows, groups, baseline, scale, eps, 0.0)
    return torch.from_numpy(_unsort(out, groups)).reshape(scores.shape)


def multi_reward_advantage(responses: Responses, rule: Rule, coefficients: Coefficients) -> Tensor:
    perception, reasoning, group_ids, format_valid, accuracy = responses
    groups = _find_groups(group_ids)
    rows = np.empty((2 if rule.reward is None else 3, group_ids.shape[0]))
    rows[0], rows[1] = _sort(_numpy(perception), groups), _sort(_numpy(reasoning), groups)
    valid = _sort(_numpy(format_valid), groups).astype(bool, copy=False) if format_valid is not None else np.array(True)
    accuracy = _sort(_numpy(accuracy), groups).astype(np.float64) if accuracy is not None else None
    with np.errstate(invalid="ignore", over="ignore"):
        if format_valid is not None:
            rows[:2] = _replace_invalid(rows[:2], valid, groups)
        return torch.from_numpy(_unsort(_combine(rows, valid, accuracy, groups, rule, coefficients), groups))


def _combine(
    rows: np.ndarray, valid: np.ndarray, accuracy: np.ndarray | None, groups: _Groups, rule: Rule, c: Coefficients
) -> np.ndarray:
    """``rows`` (2 or 3, B): both scores, and room for the reward of a rule that has one -> (B,)."""
    kind = np.where(valid, 0 if accuracy is None else accuracy == 0, 2)  # (B,) or (): right, wrong, invalid

    def amount(multiples: tuple[float, float]) -> np.ndarray:
        return np.array((0.0, multiples[0] * c.wrong_penalty, multiples[1] * c.format_penalty)).take(kind)

    if rule.reward is not None:
        assert accuracy is not None  # such a rule reads it
        earned = c.accuracy_weight * accuracy + c.format_weight * valid  # r
        rows[2] = np.array((1.0, 1.0, rule.reward.invalid)).take(kind) * earned - amount(rule.reward.fine)
    least = np.array((c.min_std, c.min_std, 0.0))[: len(rows), None]  # of the scores alone
    z = _normalize(rows, groups, "mean", "std", c.eps, least)
    advantage = c.perception_weight * z[0] + c.reasoning_weight * z[1]
    if rule.scaled:
        advantage *= c.align_coef
    advantage *= np.array(rule.gate, dtype=np.float64).take(kind)
    if accuracy is not None:
        advantage += np.where(valid, accuracy - accuracy, 0.0)  # NaN and infinite ones show
    advantage -= amount(rule.penalty)
    return advantage if rule.reward is None else z[2] + advantage


def _normalize(
    rows: np.ndarray, groups: _Groups, baseline: str, scale: str, eps: float, least: np.ndarray | float
) -> np.ndarray:
    """(K, B) -> (K, B); ``least`` (K, 1) or one number: smallest std."""
    _, start, size, of_row = groups
    # Shifted by the group's first value, so that equal scores give exactly 0.
    centred = rows - _spread(rows.take(start, axis=1), of_row)
    centred -= _spread(np.add.reduceat(centred, start, axis=1) / size, of_row)
    alone = size == 1
    factor = 1.0
    if scale == "std":
        variance = np.add.reduceat(centred * centred, start, axis=1) / np.maximum(size - 1.0, 1.0)
        denominator = np.where(alone, 1.0, np.maximum(np.sqrt(variance), least)) + eps
        denominator[denominator == 0.0] = 1.0  # equal scores and eps 0: 0
        factor = 1.0 / denominator
    if baseline == "leave_one_out":
        factor = factor * (size / np.maximum(size - 1.0, 1.0))
    if alone.any():
        centred = np.where(alone[of_row], rows, centred)
    return centred * (_spread(factor, of_row) if isinstance(factor, np.ndarray) else factor)


def _replace_invalid(scores: np.ndarray, valid: np.ndarray, groups: _Groups) -> np.ndarray:
    """(2, B) -> (2, B): invalid responses get their group's smallest valid score - 1, or -1."""
    lowest = np.minimum.reduceat(np.where(valid, scores, np.inf), groups.start, axis=1) - 1.0
    lowest[:, ~np.logical_or.reduceat(valid, groups.start)] = -1.0
    return np.where(valid, scores, _spread(lowest, groups.of_row))


def _find_groups(group_ids: Tensor) -> _Groups:
    ids = group_ids.numpy(force=True)
    order = None
    if (ids[1:] < ids[:-1]).any():
        order = ids.argsort(kind="stable")
        ids = ids[order]
    changes = ids[1:] != ids[:-1]
    inner = changes.nonzero()[0]
    edge = np.empty(len(inner) + 2, dtype=np.int64)  # first row of every group, and B
    edge[0], edge[1:-1], edge[-1] = 0, inner + 1, len(ids)
    of_row = np.zeros(len(ids), dtype=np.int64)
    changes.cumsum(out=of_row[1:])
    return _Groups(order, edge[:-1], (edge[1:] - edge[:-1]).astype(np.float64), of_row)


def _spread(of_group: np.ndarray, of_row: np.ndarray) -> np.ndarray:
    """(..., G) -> (..., B): every row gets its group's value."""
    return of_group.take(of_row, axis=-1)


def _numpy(tensor: Tensor) -> np.ndarray:
    """Any dtype; NumPy has no bf16 and no 8-bit floats. Forced: also of a tensor that requires grad."""
    known = not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.float32, torch.float64)
    return (tensor if known else tensor.float()).numpy(force=True)


def _sort(values: np.ndarray, groups: _Groups) -> np.ndarray:
    return values if groups.order is None else values.take(groups.order, axis=-1)


def _unsort(rows: np.ndarray, groups: _Groups) -> np.ndarray:
    if groups.order is None:
        return rows
    out = np.empty_like(rows)
    out[..., groups.order] = rows
    return out
