"""The contract: arguments, checks, dispatch. Dimensions: B responses, K rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.checks import (
    FLOATING_8,
    check_device,
    check_tensor,
    describe,
    host_sees,
    is_tensor,
    number,
    one_of,
    wrong,
)
from prism_kernels.dispatch import Impl, Implementation, Op, choose, implementation, need_triton, on_device_of
from prism_kernels.group_advantage.rules import RULES, Coefficients, Responses
from prism_kernels.operators import operator

_PACKAGE = "prism_kernels.group_advantage"
_IDS = (torch.int64, torch.int32)


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
    if not is_tensor(scores, FLOATING_8) or scores.dim() not in (1, 2):
        raise wrong("scores", "floating (B,) or (K, B)", describe(scores))
    _check_row("group_ids", group_ids, _IDS, "scores", scores)
    one_of("baseline", baseline, ("mean", "leave_one_out"))
    one_of("scale", scale, ("std", "none"))
    eps = number("eps", eps, at_least=0)
    if torch.compiler.is_compiling():
        chosen = choose("group_normalize", str(impl), scores.device.type)
        return _normalize(scores, group_ids, baseline, scale, eps, chosen)
    _, run = NORMALIZE.select(impl, scores.device, scores, group_ids)
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=_normalized_dtype(scores))
    with on_device_of(scores):
        return run(scores, group_ids, baseline=baseline, scale=scale, eps=eps).to(_normalized_dtype(scores))


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
    min_std: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Advantage of every response from its two discriminator scores and, by rule, its verifiable reward.

    All rules are one formula; with GN = :func:`group_normalize`, z the same with a std of at least ``min_std``, and
    k = align_coef (1 where a rule does not scale)::

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
        format_valid: (B,) bool, or numbers of which 0 means invalid; NaN raises on a CPU. None: all valid.
        accuracy: (B,) bool or numeric: 0 for a wrong response, else right, usually 1. A rule with the verifiable reward
            takes the number as it is (0.5: half the credit). NaN and infinite ones of valid responses show as NaN. A
            rule that treats right and wrong responses alike ("align") needs none and reads none.
        rule: "align", "penalised", "gated", ...: a name in RULES.
        min_std: the smallest std, >= 0, that the scores of a group of several are divided by: where they hardly
            differ, z then stays small. 0: the published rule, in which z has a std of 1 whatever the scores'.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        (B,) fp32 without gradient.

    Raises:
        ValueError: an argument of another shape, dtype, device or value, or accuracy missing; names it.
        RuntimeError: ``impl`` cannot run here.
    """
    check_tensor("perception", perception, {"B": None}, FLOATING_8)
    _check_row("reasoning", reasoning, FLOATING_8, "perception", perception)
    _check_row("group_ids", group_ids, _IDS, "perception", perception)
    one_of("rule", rule, tuple(RULES))
    row = RULES[rule]
    if row.reads_accuracy and accuracy is None:
        raise wrong("accuracy", f"(B,) values, 0 for wrong, which rule {rule!r} reads", "None", "or use rule='align'")
    for name, flags in (("accuracy", accuracy), ("format_valid", format_valid)):
        if flags is not None:
            _check_row(name, flags, None, "perception", perception)
            if flags.is_complex():
                raise wrong(name, "bool or real numbers (B,)", describe(flags))
    if format_valid is not None and host_sees(format_valid) and format_valid.isnan().any():
        raise wrong("format_valid", "bool or numbers, 0 for invalid", "NaN")
    responses = Responses(perception, reasoning, group_ids, format_valid, accuracy if row.reads_accuracy else None)
    coefficients = Coefficients(
        number("perception_weight", perception_weight),
        number("reasoning_weight", reasoning_weight),
        number("align_coef", align_coef),
        number("wrong_penalty", wrong_penalty),
        number("format_penalty", format_penalty),
        number("accuracy_weight", accuracy_weight),
        number("format_weight", format_weight),
        number("eps", eps, at_least=0),
        number("min_std", min_std, at_least=0),
    )
    if torch.compiler.is_compiling():
        chosen = choose("multi_reward_advantage", str(impl), perception.device.type)
        return _advantage(responses, rule, coefficients, chosen)
    _, run = ADVANTAGE.select(impl, perception.device, *responses)
    if perception.numel() == 0:
        return torch.zeros_like(perception, dtype=torch.float32)
    with on_device_of(perception):
        return run(responses, row, coefficients).float()


# torch.compile cannot look into NumPy, nor into loops over groups: there the ops are operators of torch.


@operator("group_normalize")
def _normalize(scores: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float, chosen: str) -> Tensor:
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=_normalized_dtype(scores))
    run = implementation("group_normalize", chosen)
    return run(scores, group_ids, baseline=baseline, scale=scale, eps=eps).to(_normalized_dtype(scores))


def _normalized_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


@operator("multi_reward_advantage")
def _advantage(responses: Responses, rule: str, coefficients: Coefficients, chosen: str) -> Tensor:
    if responses.perception.numel() == 0:
        return torch.zeros_like(responses.perception, dtype=torch.float32)
    return implementation("multi_reward_advantage", chosen)(responses, RULES[rule], coefficients).float()


@_normalize.fake
def _(scores: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float, chosen: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=_normalized_dtype(scores))


@_advantage.fake
def _(responses: Responses, rule: str, coefficients: Coefficients, chosen: str) -> Tensor:
    return responses.perception.new_empty(responses.perception.shape, dtype=torch.float32)


_normalize.constant()
_advantage.constant()


def _check_row(name: str, value: Tensor, dtype: str | tuple[torch.dtype, ...] | None, peer: str, like: Tensor) -> None:
    """One value per response, on the same device."""
    check_tensor(name, value, {"B": like.shape[-1]}, dtype)
    check_device(name, value, peer, like)
