"""The contract of the LM-head ops: arguments, their checks, and the choice of an implementation.

T rows, V words, H hidden, R unmasked rows, S sequences. Rows of ``targets`` that hold -100 are skipped everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from prism_kernels.dispatch import Impl, Implementation, Op
from prism_kernels.linear_logprob import reference
from prism_kernels.linear_logprob.objectives import IGNORE, LinearLogprob, PolicyLoss, PolicyObjective


def _table(name: str) -> Op:
    return Op(
        name,
        [Implementation(Impl.REFERENCE, f"prism_kernels.linear_logprob.reference:{name}", ("cpu", "cuda"))],
    )


_OPS = {
    name: _table(name) for name in ("linear_logprob", "linear_cross_entropy", "linear_objective", "linear_policy_loss")
}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    impl: str | Impl = "auto",
) -> LinearLogprob:
    """Log-probability of each row's target, log-sum-exp and entropy of its logits.

    ``z = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature``;
    ``logprob = z.log_softmax(-1).gather(-1, targets)``, ``logsumexp = z.logsumexp(-1)``,
    ``entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)``, all differentiable in hidden, weight and bias.

    Args:
        hidden: (T, H), any floating dtype. weight: (V, H), the dtype of hidden. bias: (V,) or None.
        targets: (T,) int64 in [0, V), or -100 to skip the row: its outputs are 0 and it has no gradient.
        temperature: > 0. softcap: > 0 or None (Gemma 2, arXiv 2408.00118).
    Returns:
        LinearLogprob(logprob, logsumexp, entropy | None), each (T,), fp32 (fp64 for fp64 inputs), natural logarithms.
    Raises:
        ValueError: shapes, dtypes, ranges; targets outside [0, V) where the host can see them (on a CPU).
        RuntimeError: ``impl`` cannot run here.
    """
    _check_head(hidden, weight, targets, bias, temperature, softcap)
    _choose("linear_logprob", impl, hidden)
    check_targets(targets, weight.shape[0])
    return reference.linear_logprob(hidden, weight, targets, bias, temperature, softcap, with_entropy)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    impl: str | Impl = "auto",
) -> Tensor:
    """``sum(row_weight * F.cross_entropy(logits, targets, reduction="none")) / normalizer`` over unmasked rows.

    Args:
        hidden, weight, targets, bias, softcap: as in :func:`linear_logprob`.
        row_weight: (T,) floating, a constant (no gradient), or None for ones.
        normalizer: number or 0-d tensor; default the number of unmasked rows. Pass the global one under data parallelism.
    Returns:
        0-d loss, fp32 (fp64 for fp64 inputs). No unmasked row: 0, with zero gradients.
    Raises:
        ValueError, RuntimeError: as :func:`linear_logprob`.
    """
    _check_head(hidden, weight, targets, bias, 1.0, softcap)
    _check_rows("row_weight", row_weight, hidden)
    normalizer = _scalar("normalizer", normalizer, hidden)
    _choose("linear_cross_entropy", impl, hidden)
    check_targets(targets, weight.shape[0])
    return reference.linear_cross_entropy(hidden, weight, targets, row_weight, normalizer, bias, softcap)


def linear_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    glue: Callable,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    impl: str | Impl = "auto",
) -> Tensor:
    """Any objective that is a function of the rows' log-probs and entropies, in three matrix products.

    Args:
        hidden, weight, targets, bias, temperature, softcap: as in :func:`linear_logprob`.
        glue: ``glue(logprob (R,), entropy (R,) | None, rows (R,) int64) -> (loss, dloss_dlogprob (R,),
            dloss_dentropy (R,) | None)``; ``rows`` index the input, skipped rows are absent. Runs without grad, once per
            chunk of rows; the losses of the chunks add up. :func:`~prism_kernels.linear_logprob.cispo` is an example.
        with_entropy: hand the entropies to glue.
    Returns:
        0-d loss, fp32 (fp64 for fp64 inputs), differentiable in hidden, weight and bias.
    Raises:
        ValueError, RuntimeError: as :func:`linear_logprob`.
    """
    _check_head(hidden, weight, targets, bias, temperature, softcap)
    _choose("linear_objective", impl, hidden)
    check_targets(targets, weight.shape[0])
    return reference.linear_objective(hidden, weight, targets, glue, bias, temperature, softcap, with_entropy)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    sequence_start: Tensor,
    objective: PolicyObjective,
    *,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    with_logprob: bool = True,
    impl: str | Impl = "auto",
) -> PolicyLoss:
    """Policy-gradient loss of packed sequences; the formula is in README.md.

    Args:
        hidden, weight, targets, bias, temperature, softcap: as in :func:`linear_logprob`.
        advantages: (S,), or (T,) where T differs from S. A constant.
        sequence_start: (S + 1,) int32: rows [sequence_start[i], sequence_start[i + 1]) are sequence i; from 0 to T.
        objective: a :class:`PolicyObjective`.
        old_logprob: (T,) of the policy that sampled; None: on-policy, the ratio is 1.
        ref_logprob: (T,) of the reference policy; needed where kl_coef is not 0, else only a statistic.
        rollout_logprob: (T,) as the sampler reported them; needed by importance_cap, else only a statistic.
        normalizer: number or 0-d tensor: replaces the number of rows (token_mean) or of sequences (the other aggregates).
            Pass the global one under data parallelism.
        with_entropy: return the entropies. with_logprob: return the log-probs; False allows rows of zero advantage to be
            dropped before the products (only if kl_coef = entropy_coef = 0 and ratio = "token").
    Returns:
        PolicyLoss(loss, logprob | None, entropy | None, stats). No unmasked row: loss 0, with zero gradients.
    Raises:
        ValueError, RuntimeError: as :func:`linear_logprob`; ValueError for importance_cap without rollout_logprob and for
        kl_coef without ref_logprob.
    """
    _check_head(hidden, weight, targets, bias, temperature, softcap)
    _check_policy(hidden, advantages, sequence_start, objective)
    if objective.importance_cap is not None and rollout_logprob is None:
        raise ValueError("rollout_logprob: objective.importance_cap needs it; pass the sampler's log-probs (T,)")
    if objective.kl_coef != 0 and ref_logprob is None:
        raise ValueError("ref_logprob: objective.kl_coef needs it; pass the reference policy's log-probs (T,)")
    for name, rows in (("old", old_logprob), ("ref", ref_logprob), ("rollout", rollout_logprob)):
        _check_rows(f"{name}_logprob", rows, hidden)
    normalizer = _scalar("normalizer", normalizer, hidden)
    _choose("linear_policy_loss", impl, hidden)
    check_targets(targets, weight.shape[0])
    check_sequence_start(sequence_start, hidden.shape[0])
    return reference.linear_policy_loss(
        hidden, weight, targets, advantages, sequence_start, objective, old_logprob, ref_logprob, rollout_logprob,
        normalizer, bias, temperature, softcap, with_entropy, with_logprob,
    )  # fmt: skip


def _choose(op: str, impl: str | Impl, hidden: Tensor) -> Impl:
    return _OPS[op].select(impl, hidden.device)[0]


def _check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
    """Shapes, dtypes and ranges: all that a traced (fake) tensor knows."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(
            f"hidden: got {_describe(hidden)}, expected a floating (T, H); flatten leading dimensions with .flatten(0, -2)"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight: got {_describe(weight)}, expected (V, H) with H = {hidden.shape[1]}, as in nn.Linear"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight: got {weight.dtype}, expected the dtype of hidden, {hidden.dtype}; cast one of them")
    if targets.dim() != 1 or targets.shape[0] != hidden.shape[0] or targets.dtype != torch.int64:
        raise ValueError(f"targets: got {_describe(targets)}, expected (T,) int64 with T = {hidden.shape[0]}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias: got {_describe(bias)}, expected a floating (V,) with V = {weight.shape[0]}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: got {tensor.device}, expected the device of hidden, {hidden.device}")
    _check_device("targets", targets, hidden)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: got {temperature}, expected a finite number > 0")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap: got {softcap}, expected None or a finite number > 0")


def _check_policy(hidden: Tensor, advantages: Tensor, sequence_start: Tensor, objective: PolicyObjective) -> None:
    if not isinstance(objective, PolicyObjective):
        raise ValueError(
            f"objective: got {type(objective).__name__}, expected a PolicyObjective, e.g. PolicyObjective.grpo()"
        )
    if (
        sequence_start.dim() != 1
        or sequence_start.shape[0] == 0
        or sequence_start.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"sequence_start: got {_describe(sequence_start)}, expected (S + 1,) int32 offsets from 0 to T"
        )
    num_rows, num_sequences = hidden.shape[0], sequence_start.shape[0] - 1
    if (
        advantages.dim() != 1
        or advantages.shape[0] not in (num_sequences, num_rows)
        or not advantages.is_floating_point()
        or advantages.requires_grad
    ):
        raise ValueError(
            f"advantages: got {_describe(advantages)}, expected floating constants, one per sequence (S = {num_sequences}) or "
            f"per row (T = {num_rows}); detach() them if they have a gradient"
        )
    _check_device("advantages", advantages, hidden)
    _check_device("sequence_start", sequence_start, hidden)


def _check_rows(name: str, rows: Tensor | None, hidden: Tensor) -> None:
    """A constant per row."""
    if rows is None:
        return
    if rows.shape != hidden.shape[:1] or not rows.is_floating_point() or rows.requires_grad:
        raise ValueError(
            f"{name}: got {_describe(rows)}, expected floating constants (T,) with T = {hidden.shape[0]}; detach() it if it "
            "has a gradient"
        )
    _check_device(name, rows, hidden)


def _check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"{name}: got {tensor.device}, expected the device of hidden, {hidden.device}")


def _scalar(name: str, value: float | Tensor | None, hidden: Tensor) -> Tensor | None:
    """A number or a 0-d tensor as a 0-d tensor beside hidden, made without a copy from the host."""
    if value is None:
        return None
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.requires_grad:
            raise ValueError(f"{name}: got {_describe(value)}, expected a positive number or a constant 0-d tensor")
        return value.to(hidden.device, dtype)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: got {value}, expected a finite number >= 0")
    return torch.full((), float(value), dtype=dtype, device=hidden.device)


def check_targets(targets: Tensor, num_words: int) -> None:
    """ValueError for a target outside [0, V), where the host can see them."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ((targets < 0) & (targets != IGNORE)) | (targets >= num_words)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets: got {int(targets[row])} in row {row}, expected {IGNORE} or a word in [0, {num_words})"
        )


def check_sequence_start(sequence_start: Tensor, num_rows: int) -> None:
    """ValueError unless the offsets rise from 0 to T, where the host can see them."""
    if sequence_start.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if sequence_start[0] != 0 or sequence_start[-1] != num_rows or (sequence_start.diff() < 0).any():
        raise ValueError(
            f"sequence_start: got {sequence_start.tolist()[:8]}... to {int(sequence_start[-1])}, expected offsets that rise "
            f"from 0 to T = {num_rows}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}" + (" with requires_grad" if tensor.requires_grad else "")
