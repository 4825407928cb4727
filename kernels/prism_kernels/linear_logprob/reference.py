"""The definition of the LM-head ops: plain torch with autograd, fp32 inside (fp64 stays fp64), all logits at once.

T rows, V vocab size, H hidden, R unmasked rows, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.linear_logprob.checks import check_glue, check_normalizer, check_sequence_start, check_targets
from prism_kernels.linear_logprob.objectives import LOG_RATIO_LIMIT, PolicyObjective
from prism_kernels.linear_logprob.records import (
    IGNORE,
    NOTHING_ELSE,
    Also,
    CrossEntropyBatch,
    Glue,
    Head,
    LinearLogprob,
    LinearLogprobAlso,
    Options,
    PolicyBatch,
    PolicyLoss,
)


def linear_logprob(
    head: Head, targets: Tensor, options: Options, also: Also = NOTHING_ELSE
) -> LinearLogprob | LinearLogprobAlso:
    check_targets(targets, head)
    rows = _rows(targets)
    dtype = head.wide
    with torch.autocast(head.hidden.device.type, enabled=False):  # which would make it a bf16 product
        z = head.hidden[rows].to(dtype) @ head.weight.to(dtype).T  # (R, V)
    if head.bias is not None:
        z = z + head.bias.to(dtype)
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    z = z / head.temperature
    barred = None
    if head.bars:
        barred = torch.arange(head.vocab_size, device=z.device) >= head.words
        barred[head.forbidden] = True
        z = z.masked_fill(barred, float("-inf"))
    log_p = z.log_softmax(-1)
    logprob = log_p.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
    entropy = None
    if options.with_entropy:
        # A token that is forbidden has p = 0 and adds 0, not 0 * -inf.
        entropy = -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(-1)

    def scatter(values: Tensor) -> Tensor:
        return values.new_zeros(targets.shape[0]).index_copy(0, rows, values)

    out = LinearLogprob(scatter(logprob), scatter(z.logsumexp(-1)), None if entropy is None else scatter(entropy))
    if not any(also):
        return out
    z, log_p = z.detach(), log_p.detach()
    # A word that is barred has a logit of -inf and is not in the mean.
    mean = z.masked_fill(barred, 0.0).sum(-1) / (~barred).sum() if barred is not None else z.mean(-1)
    further = (z.argmax(-1) == targets[rows], mean, (2 * log_p).logsumexp(-1))
    return LinearLogprobAlso(*out, *[scatter(value) if asked else None for value, asked in zip(further, also)])


def linear_cross_entropy(head: Head, batch: CrossEntropyBatch, options: Options) -> Tensor:
    check_normalizer(batch.normalizer)
    rows = _rows(batch.targets)
    nll = -linear_logprob(head, batch.targets, options).logprob[rows]
    if batch.row_weight is not None:
        nll = nll * batch.row_weight[rows].to(nll.dtype)
    if rows.numel() == 0:
        return nll.sum()
    return nll.sum() / (rows.numel() if batch.normalizer is None else batch.normalizer)


def linear_objective(head: Head, targets: Tensor, glue: Glue, options: Options) -> Tensor:
    out = linear_logprob(head, targets, options)
    rows = _rows(targets)
    logprob = out.logprob[rows]
    entropy = None if out.entropy is None else out.entropy[rows]
    with torch.no_grad():
        given = glue(logprob.detach(), None if entropy is None else entropy.detach(), rows)
    loss, d_logprob, d_entropy = check_glue(given, logprob, entropy)
    # The value is the glue's, the gradient is that of the two linear terms, each 0 in value.
    total = loss.to(logprob.dtype) + (d_logprob.to(logprob.dtype) * (logprob - logprob.detach())).sum()
    if entropy is not None and d_entropy is not None:
        total = total + (d_entropy.to(entropy.dtype) * (entropy - entropy.detach())).sum()
    return total


def linear_policy_loss(head: Head, batch: PolicyBatch, objective: PolicyObjective, options: Options) -> PolicyLoss:
    targets, advantages, sequence_start, old, ref, rollout, normalizer = batch
    check_sequence_start(sequence_start, targets.shape[0])
    check_normalizer(normalizer)
    num_rows, num_sequences = targets.shape[0], sequence_start.shape[0] - 1
    need_entropy = options.with_entropy or objective.entropy_coef != 0
    out = linear_logprob(head, targets, options._replace(with_entropy=need_entropy))
    rows = _rows(targets)
    lengths = (sequence_start[1:] - sequence_start[:-1]).long()
    sequence = torch.arange(num_sequences, device=targets.device).repeat_interleave(lengths)[rows]  # (R,) its sequence
    per_row = advantages.shape[0] == num_rows != num_sequences
    advantage = (advantages[rows] if per_row else advantages[sequence]).to(out.logprob.dtype)

    logprob = out.logprob[rows]
    old, ref, rollout = (None if t is None else t[rows].to(logprob.dtype) for t in (old, ref, rollout))
    old = logprob.detach() if old is None else old
    stats: dict[str, Tensor] = {"rows": logprob.detach().new_tensor(rows.numel())}
    ratio = _ratio(logprob, old, sequence, num_sequences, objective.ratio)
    loss = _surrogate(ratio, advantage, objective, stats)
    token_log_ratio = (logprob - old).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    stats["kl_old"] = (token_log_ratio.exp() - token_log_ratio - 1).mean()
    if rollout is not None:
        loss = loss * _importance(old, rollout, objective.importance_cap, stats)
    if ref is not None:
        kl = _kl(logprob, ref, objective.kl_estimator)
        stats["kl_ref"] = kl.mean()
        if objective.kl_coef != 0:
            loss = loss + objective.kl_coef * kl
    if out.entropy is not None:
        stats["entropy_mean"] = out.entropy[rows].mean()
        if objective.entropy_coef != 0:
            loss = loss - objective.entropy_coef * out.entropy[rows]
    loss = _aggregate(loss, sequence, num_sequences, objective, normalizer)

    if rows.numel() == 0:
        stats = {"rows": stats["rows"]}
    return PolicyLoss(
        loss,
        out.logprob.detach() if options.with_logprob else None,
        out.entropy.detach() if out.entropy is not None and options.with_entropy else None,
        {name: value.detach() for name, value in stats.items()},
    )


def _rows(targets: Tensor) -> Tensor:
    """(R,) int64: the unmasked rows."""
    return (targets != IGNORE).nonzero().squeeze(1)


def _ratio(logprob: Tensor, old: Tensor, sequence: Tensor, num_sequences: int, kind: str) -> Tensor:
    log_ratio = (logprob - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "token":
        return log_ratio.exp()
    total = log_ratio.new_zeros(num_sequences).index_add(0, sequence, log_ratio)
    count = log_ratio.new_zeros(num_sequences).index_add(0, sequence, torch.ones_like(log_ratio))
    return (total / count)[sequence].exp().detach() * (logprob - logprob.detach()).exp()


def _surrogate(ratio: Tensor, advantage: Tensor, objective: PolicyObjective, stats: dict[str, Tensor]) -> Tensor:
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    loss = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    stats["ratio_mean"] = ratio.mean()
    stats["clip_low_fraction"] = ((ratio < low) & (advantage < 0)).to(ratio.dtype).mean()
    stats["clip_high_fraction"] = ((ratio > high) & (advantage > 0)).to(ratio.dtype).mean()
    if objective.dual_clip is not None:
        bound = -objective.dual_clip * advantage
        bounded = (advantage < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
        stats["dual_clip_fraction"] = bounded.to(ratio.dtype).mean()
    return loss


def _importance(old: Tensor, rollout: Tensor, cap: float | None, stats: dict[str, Tensor]) -> Tensor | float:
    difference = (old - rollout).detach()
    stats["rollout_diff_mean"] = difference.abs().mean()
    stats["rollout_diff_max"] = difference.abs().max() if difference.numel() else difference.new_zeros(())
    if cap is None:
        return 1.0
    raw = difference.exp()
    stats["importance_mean"] = raw.clamp(max=cap).mean()
    stats["importance_capped_fraction"] = (raw > cap).to(raw.dtype).mean()
    return raw.clamp(max=cap)


def _kl(logprob: Tensor, ref: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return logprob - ref
    difference = (ref - logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k2":
        return difference.square() / 2
    return difference.exp() - difference - 1


def _aggregate(
    loss: Tensor, sequence: Tensor, num_sequences: int, objective: PolicyObjective, normalizer: Tensor | None
) -> Tensor:
    if loss.numel() == 0:
        return loss.sum()
    if objective.aggregate == "token_mean":
        return loss.sum() / (loss.numel() if normalizer is None else normalizer)
    divisor = num_sequences if normalizer is None else normalizer
    if objective.aggregate == "sequence_mean":
        count = loss.new_zeros(num_sequences).index_add(0, sequence, torch.ones_like(loss))
        return (loss / count[sequence]).sum() / divisor
    if objective.aggregate == "sequence_sum":
        return loss.sum() / divisor
    assert objective.max_length is not None  # fixed_length: the objective has checked it
    return loss.sum() / (divisor * objective.max_length)
