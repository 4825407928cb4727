"""Truth in float64, row by row, with autograd: slow, and written from the formulas rather than from the kernels."""

from __future__ import annotations

import math

import torch


def double(*tensors):
    """Leaf copies in float64 that want gradients; None stays None."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def logits(hidden, weight, bias=None, temperature=1.0, softcap=None):
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def log_probs(hidden, weight, targets, bias=None, temperature=1.0, softcap=None):
    """(logprob, logsumexp, entropy), each (T,), of any dtype: in bf16 this is what eager torch does."""
    kept = targets != -100
    z = logits(hidden, weight, bias, temperature, softcap)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    log_p = z.log_softmax(-1)
    logprob = log_p.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return tuple(torch.where(kept, values, 0.0) for values in (logprob, z.logsumexp(-1), entropy))


def policy_loss(logprob, entropy, targets, advantages, starts, objective, old, ref, rollout, divisor):
    """The policy loss one row at a time, from float64 log-probs: (loss, what every unmasked row showed by name)."""
    starts = [int(s) for s in starts]
    spans = [(starts[i], starts[i + 1]) for i in range(len(starts) - 1)]
    num_rows, num_sequences = len(targets), len(spans)
    total, unmasked = torch.zeros((), dtype=torch.float64), 0
    names = ("ratio", "low", "high", "dual", "kl_old", "kl_ref", "entropy", "diff", "weight", "capped")
    seen = {name: [] for name in names}
    for i, (start, stop) in enumerate(spans):
        rows = [t for t in range(start, stop) if targets[t] != -100]
        unmasked += len(rows)
        olds = {t: (logprob[t].detach() if old is None else old[t]) for t in rows}
        log_ratios = {t: (logprob[t] - olds[t]).clamp(-20, 20) for t in rows}
        part = torch.zeros((), dtype=torch.float64)
        for t in rows:
            advantage = float(advantages[t] if len(advantages) == num_rows != num_sequences else advantages[i])
            if objective.ratio == "token":
                ratio = log_ratios[t].exp()
            else:
                mean = sum(float(log_ratios[s]) for s in rows) / len(rows)
                ratio = math.exp(mean) * (logprob[t] - logprob[t].detach()).exp()
            low, high = 1 - objective.clip_low, 1 + objective.clip_high
            clipped = ratio if low <= ratio <= high else torch.tensor(low if ratio < low else high, dtype=torch.float64)
            loss = -(ratio * advantage if ratio * advantage <= clipped * advantage else clipped * advantage)
            seen["ratio"].append(float(ratio))
            seen["low"].append(float(ratio < low and advantage < 0))
            seen["high"].append(float(ratio > high and advantage > 0))
            if objective.dual_clip is not None:
                bounded = advantage < 0 and loss > -objective.dual_clip * advantage
                seen["dual"].append(float(bounded))
                if bounded:
                    loss = torch.tensor(-objective.dual_clip * advantage, dtype=torch.float64)
            d = float(log_ratios[t])
            seen["kl_old"].append(math.exp(d) - d - 1)
            if rollout is not None:
                raw = math.exp(float(olds[t] - rollout[t]))
                seen["diff"].append(abs(float(olds[t] - rollout[t])))
                if objective.importance_cap is not None:
                    loss = loss * min(raw, objective.importance_cap)
                    seen["weight"].append(min(raw, objective.importance_cap))
                    seen["capped"].append(float(raw > objective.importance_cap))
            if ref is not None:
                difference = (ref[t] - logprob[t]).clamp(-20, 20)
                kl = {
                    "k1": logprob[t] - ref[t],
                    "k2": difference**2 / 2,
                    "k3": difference.exp() - difference - 1,
                }[objective.kl_estimator]
                seen["kl_ref"].append(float(kl))
                loss = loss + objective.kl_coef * kl
            seen["entropy"].append(float(entropy[t]))
            loss = loss - objective.entropy_coef * entropy[t]
            part = part + (loss / len(rows) if objective.aggregate == "sequence_mean" else loss)
        total = total + part
    if unmasked == 0:
        return total, seen
    if divisor is None:
        divisor = unmasked if objective.aggregate == "token_mean" else num_sequences
    if objective.aggregate == "fixed_length":
        divisor = divisor * objective.max_length
    return total / divisor, seen


def relative_error(actual, truth):
    """Norm of the difference over the norm of the truth, in float64."""
    truth = truth.detach().double().cpu()
    return float((actual.detach().double().cpu() - truth).norm() / truth.norm().clamp(min=1e-30))


def assert_as_exact(actual, truth, eager, slack, what):
    """The error against the truth is at most eager torch's in the same dtype, plus ``slack`` (relative)."""
    ours, theirs = relative_error(actual, truth), relative_error(eager, truth)
    if not ours <= theirs + slack:
        distance = (actual.detach().double().cpu() - truth.detach().double().cpu()).abs()
        worst = [int(i) for i in torch.unravel_index(distance.argmax(), distance.shape)] if distance.dim() else []
        message = f"{what}: relative error {ours:.2e}, eager {theirs:.2e}, slack {slack:.0e}, worst at {worst}"
        raise AssertionError(message)
