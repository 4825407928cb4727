"""Checks of the arguments. Each error names the argument, what it got, what was expected and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.linear_logprob.objectives import IGNORE, PolicyObjective

INFINITY = float("inf")  # comparisons, unlike math.isfinite, can be traced


def check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
    """Shapes, dtypes and ranges: all that a traced (fake) tensor knows."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: got {_got(hidden)}, expected a floating (T, H); flatten more dimensions first")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight: got {_got(weight)}, expected (V, H) with H = {hidden.shape[1]}, as in nn.Linear")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight: got {weight.dtype}, expected the dtype of hidden, {hidden.dtype}; cast one of them")
    if targets.dim() != 1 or targets.shape[0] != hidden.shape[0] or targets.dtype != torch.int64:
        raise ValueError(f"targets: got {_got(targets)}, expected (T,) int64 with T = {hidden.shape[0]}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias: got {_got(bias)}, expected a floating (V,) with V = {weight.shape[0]}")
    _check_device("weight", weight, hidden)
    if bias is not None:
        _check_device("bias", bias, hidden)
    _check_device("targets", targets, hidden, host=True)
    if not 0 < temperature < INFINITY:
        raise ValueError(f"temperature: got {temperature}, expected a finite number > 0")
    if softcap is not None and not 0 < softcap < INFINITY:
        raise ValueError(f"softcap: got {softcap}, expected None or a finite number > 0")


def check_policy(
    hidden: Tensor,
    advantages: Tensor,
    sequence_start: Tensor,
    objective: PolicyObjective,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
) -> None:
    if not isinstance(objective, PolicyObjective):
        raise ValueError(f"objective: got {type(objective).__name__}, expected a PolicyObjective, e.g. .grpo()")
    if sequence_start.dim() != 1 or not sequence_start.shape[0] or sequence_start.dtype not in _OFFSETS:
        raise ValueError(f"sequence_start: got {_got(sequence_start)}, expected (S + 1,) int32 offsets from 0 to T")
    num_rows, num_sequences = hidden.shape[0], sequence_start.shape[0] - 1
    if num_sequences == 0 and num_rows > 0:
        raise ValueError(f"sequence_start: got no sequence, expected offsets from 0 to T = {num_rows}")
    lengths = (num_sequences, num_rows)
    if advantages.dim() != 1 or advantages.shape[0] not in lengths or not advantages.is_floating_point():
        raise ValueError(
            f"advantages: got {_got(advantages)}, expected a floating vector, one per sequence (S = {num_sequences}) "
            f"or one per row (T = {num_rows})"
        )
    _check_device("advantages", advantages, hidden, host=True)
    _check_device("sequence_start", sequence_start, hidden, host=True)
    if objective.importance_cap is not None and rollout_logprob is None:
        raise ValueError("rollout_logprob: objective.importance_cap needs it; pass the sampler's log-probs (T,)")
    if objective.kl_coef != 0 and ref_logprob is None:
        raise ValueError("ref_logprob: objective.kl_coef needs it; pass the reference policy's log-probs (T,)")


def constant_rows(name: str, rows: Tensor | None, hidden: Tensor, host: bool = False) -> Tensor | None:
    """A constant per row, detached."""
    if rows is None:
        return None
    if rows.shape != hidden.shape[:1] or not rows.is_floating_point():
        raise ValueError(f"{name}: got {_got(rows)}, expected a floating (T,) with T = {hidden.shape[0]}")
    _check_device(name, rows, hidden, host)
    return rows.detach()


def constant_scalar(name: str, value: float | Tensor | None, hidden: Tensor) -> Tensor | None:
    """A number or a 0-d tensor as a 0-d tensor beside hidden, made without a copy from the host."""
    if value is None:
        return None
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: got {_got(value)}, expected a number or a 0-d tensor; take its [0] or .sum()")
        return value.detach().to(hidden.device, dtype, non_blocking=True)
    if not 0 <= value < INFINITY:
        raise ValueError(f"{name}: got {value}, expected a finite number >= 0")
    return torch.full((), float(value), dtype=dtype, device=hidden.device)


def check_targets(targets: Tensor, num_words: int) -> None:
    """ValueError for a target outside [0, V), where the host can see them."""
    if targets.device.type != "cpu":
        return
    bad = ((targets < 0) & (targets != IGNORE)) | (targets >= num_words)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"targets: got {int(targets[row])} in row {row}, expected {IGNORE} or one in [0, {num_words})")


def check_sequence_start(sequence_start: Tensor, num_rows: int) -> None:
    """ValueError unless the offsets rise from 0 to T, where the host can see them."""
    if sequence_start.device.type != "cpu":
        return
    if sequence_start[0] != 0 or sequence_start[-1] != num_rows or (sequence_start.diff() < 0).any():
        seen = sequence_start.tolist()
        raise ValueError(
            f"sequence_start: got {seen[:8]} ... {seen[-1]}, expected offsets that rise from 0 to {num_rows}"
        )


_OFFSETS = (torch.int32, torch.int64)


def _check_device(name: str, tensor: Tensor, hidden: Tensor, host: bool = False) -> None:
    """``host``: may also lie on the host, where rows that nothing reads can then be planned away."""
    if tensor.device != hidden.device and not (host and tensor.device.type == "cpu"):
        raise ValueError(f"{name}: got {tensor.device}, expected the device of hidden, {hidden.device}")


def _got(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
