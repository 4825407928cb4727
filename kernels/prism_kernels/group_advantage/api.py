"""The contract: arguments, checks, dispatch. Dimensions: B responses, K rewards."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prism_kernels.dispatch import Impl, Implementation, Op, need_triton, on_device_of
from prism_kernels.group_advantage.rules import RULES, Coefficients, Responses

_PACKAGE = "prism_kernels.group_advantage"


def _op(name: str) -> Op:
    return Op(
        name,
        [
            Implementation(Impl.TRITON, f"{_PACKAGE}.triton_kernel:{name}", ("cuda",), need_triton),
            Implementation(Impl.CPU, f"{_PACKAGE}.cpu:{name}", ("cpu",)),
            Implementation(Impl.REFERENCE, f"{_PACKAGE}.reference:{name}", ("cpu", "cuda")),
        ],
    )


NORMALIZE = _op("group_normalize")
ADVANTAGE = _op("multi_reward_advantage")


@torch.no_grad()
def group_normalize(
    scores: Tensor,
    group_ids: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "std",
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Normalise scores within their group: ``(s - baseline) / (std + eps)``, std unbiased.

    Equals, for one group ``s`` of more than one response, ``(s - s.mean()) / (s.std() + eps)``; a group of one has
    baseline 0 and std 1 under every option. Equal scores give exactly 0. NaN stays in its group.

    Args:
        scores: (B,) or (K, B) floating. Each of K rewards is normalised alone; summing the rows then gives
            normalise-then-sum (GDPO).
        group_ids: (B,) int64 or int32, any values, any order, any group sizes.
        baseline: "mean" (GRPO, arXiv 2402.03300) or "leave_one_out", the mean of the others (RLOO, arXiv 2402.14740).
        scale: "std", or "none": no division (Dr.GRPO, arXiv 2503.20783).
        eps: added to the std, >= 0.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        The shape of ``scores``; fp64 for fp64 scores, else fp32. Carries no gradient.

    Raises:
        ValueError: an argument of another shape, dtype, device or value; names it.
        RuntimeError: ``impl`` cannot run here.
    """
    if not _is_floating(scores) or scores.dim() not in (1, 2):
        raise ValueError(f"scores: expected floating (B,) or (K, B), got {_describe(scores)}")
    _check_ids(group_ids, scores, "scores")
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"baseline: expected 'mean' or 'leave_one_out', got {baseline!r}")
    if scale not in ("std", "none"):
        raise ValueError(f"scale: expected 'std' or 'none', got {scale!r}")
    eps = _number("eps", eps, at_least_zero=True)
    _, run = NORMALIZE.select(impl, scores.device)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=dtype)
    with on_device_of(scores):
        return run(scores, group_ids, baseline=baseline, scale=scale, eps=eps).to(dtype)


@torch.no_grad()
def multi_reward_advantage(
    perception: Tensor,
    reasoning: Tensor,
    group_ids: Tensor,
    *,
    format_valid: Tensor | None = None,
    accuracy: Tensor | None = None,
    rule: str = "align",
    perception_weight: float = 0.5,
    reasoning_weight: float = 0.5,
    align_coef: float = 1.0,
    wrong_penalty: float = 1.0,
    format_penalty: float = 0.0,
    accuracy_weight: float = 1.0,
    format_weight: float = 1.0,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Advantage of every response from its two discriminator scores and, by rule, its verifiable reward.

    All rules are one formula; with z and GN = :func:`group_normalize`, k = align_coef (1 where a rule does not scale)::

        A       = GN(share r - fine) + k A_align gate - penalty
        A_align = perception_weight z(perception) + reasoning_weight z(reasoning)
        r       = accuracy_weight accuracy + format_weight (1 where the format is valid)

    gate, share (of r), fine (wrong_penalty and format_penalty) and penalty (likewise) are a rule's numbers for a right
    response, for a wrong one (valid format, accuracy 0) and for one of invalid format: the rows of
    ``prism_kernels.group_advantage.rules.RULES``, written out in docs/method.md 4. "align", the default, is
    ``A_align - format_penalty`` where the format is invalid, and ``A_align`` elsewhere.

    Scores of invalid responses are replaced, whatever they hold, by the smallest valid score of their group minus 1, or
    by -1 where the group has no valid response. Scores are not clamped. NaN stays in its group. Source: PRISM
    (arXiv 2604.28123).

    Args:
        perception, reasoning: (B,) floating scores.
        group_ids: (B,) int64 or int32, any values, any order, any group sizes.
        format_valid: (B,) bool, or numbers of which 0 means invalid; None: all valid.
        accuracy: (B,) in {0, 1}, bool or numeric; a rule that treats right and wrong responses alike ("align") needs
            none.
        rule: "align", "penalised", "gated", ...: a name in RULES.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        (B,) fp32 without gradient.

    Raises:
        ValueError: an argument of another shape, dtype, device or value, or accuracy missing; names it.
        RuntimeError: ``impl`` cannot run here.
    """
    if not _is_floating(perception) or perception.dim() != 1:
        raise ValueError(f"perception: expected floating (B,), got {_describe(perception)}")
    if not _is_floating(reasoning):
        raise ValueError(f"reasoning: expected floating (B,), got {_describe(reasoning)}")
    _check_row("reasoning", reasoning, perception)
    _check_ids(group_ids, perception, "perception")
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    row = RULES[rule]
    if row.reads_accuracy and accuracy is None:
        raise ValueError(f"accuracy: rule {rule!r} reads it; pass (B,) values in {{0, 1}}, or use rule='align'")
    for name, flags in (("accuracy", accuracy), ("format_valid", format_valid)):
        if flags is not None:
            _check_row(name, flags, perception)
            if flags.is_complex():
                raise ValueError(f"{name}: expected bool or real numbers (B,), got {_describe(flags)}")
    responses = Responses(perception, reasoning, group_ids, format_valid, accuracy if row.reads_accuracy else None)
    coefficients = Coefficients(
        _number("perception_weight", perception_weight),
        _number("reasoning_weight", reasoning_weight),
        _number("align_coef", align_coef),
        _number("wrong_penalty", wrong_penalty),
        _number("format_penalty", format_penalty),
        _number("accuracy_weight", accuracy_weight),
        _number("format_weight", format_weight),
        _number("eps", eps, at_least_zero=True),
    )
    _, run = ADVANTAGE.select(impl, perception.device)
    if perception.numel() == 0:
        return torch.zeros_like(perception, dtype=torch.float32)
    with on_device_of(perception):
        return run(responses, row, coefficients).float()


def _is_floating(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point()


def _describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return f"no tensor but {type(tensor).__name__}"
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _check_ids(group_ids: Tensor, scores: Tensor, name: str) -> None:
    if not isinstance(group_ids, Tensor) or group_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"group_ids: expected int64 or int32, got {_describe(group_ids)}")
    _check_row("group_ids", group_ids, scores, name)


def _check_row(name: str, tensor: Tensor, like: Tensor, of: str = "perception") -> None:
    """One value per response, on the same device."""
    batch = like.shape[-1:]
    if not isinstance(tensor, Tensor) or tensor.shape != batch or tensor.device != like.device:
        raise ValueError(
            f"{name}: expected ({batch[0]},) on {like.device}, one value per response of {of}, got {_describe(tensor)}"
        )


def _number(name: str, value: float, at_least_zero: bool = False) -> float:
    """``value`` as a Python float; NumPy and zero-dimensional tensors pass, texts do not."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number) or (at_least_zero and number < 0):
        expected = "a number >= 0" if at_least_zero else "a finite number"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return number
