"""Truth in float64, row by row, with autograd: slow, and written from the formulas rather than from the kernels."""

from __future__ import annotations

import math

import torch


def double(*tensors):
    """Leaf copies in float64 that want gradients; None stays None."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def logits(hidden, weight, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def log_probs(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """(logprob, logsumexp, entropy), each (T,), of any dtype: in bf16 this is what eager torch does."""
    kept = targets != -100
    z = logits(hidden, weight, bias, temperature, softcap, logit_scale)
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


# ---- the law of tolerances
#
# A tolerance is derived, never read off one machine: what torch, MKL and oneDNN choose by CPU (the width of their
# vectors, how they block a sum) changes an error several times over. Two laws, both in the unit roundoff u = eps / 2 of
# the dtype that sums are kept in, fp32 at the least:
#
# 1. ``assert_as_exact``, against float64 truth: at most FACTOR times the error of eager torch in the same dtype on the
#    same machine, plus a slack of u * sqrt(n) for n terms. Sums of n terms lose that much where their roundings are
#    random (Higham and Mary 2019: a small constant times sqrt(n) u), and at worst where they are blocked by
#    sqrt(n). The slack is needed where eager is exact by luck. FACTOR is the 2 of QuACK's products
#    (tests/test_linear.py: 2 x the largest error of eager, plus 1e-6) and of flash-attention's tests, where softcap
#    gets the 3 that WORST is; cut-cross-entropy's take eager's error plus a fixed 1e-3 or 1e-2 by dtype.
# 2. ``assert_same``, two ways to the same numbers in one dtype, float64 truth for float64 code among them: n * eps.
#    Any order of a sum of n terms is right to n * u times the sum of their sizes (Higham 2002, section 4.2), each way.
#
# n counts the roundings on the way to an element: the lengths of the sums, one after the other, and the elementary
# functions between them. It is counted from shapes, and need not be exact: law 1 goes with its root.
FACTOR, WORST = 2.0, 3.0


def roundoff(*dtypes):
    """u of the coarsest of these dtypes, sums in fp32 where they are half precision."""
    return max(torch.finfo(torch.promote_types(dtype, torch.float32)).eps for dtype in dtypes) / 2


def rounded(dtype, times=1):
    """Largest relative error, in norm, of a tensor that is exact but for ``times`` roundings to ``dtype``.

    An element's error is even within u of its power of two, u / sqrt(3) in the mean square, and one rounding knows
    nothing of the next.
    """
    return torch.finfo(dtype).eps / 2 * math.sqrt(times / 3)


def relative_error(actual, truth):
    """Norm of the difference over the norm of the truth, in float64."""
    truth = truth.detach().double().cpu()
    return float((actual.detach().double().cpu() - truth).norm() / truth.norm().clamp(min=1e-30))


def assert_as_exact(actual, truth, eager, terms, what="", factor=FACTOR):
    """Law 1. ``terms`` is n; in norm within ``factor``, and no element further off than WORST / FACTOR times that.

    Where ``actual`` is float64 eager torch is the truth, and law 2 holds.
    """
    if actual.dtype is torch.float64:
        assert_same(actual, truth, terms, what)
        return
    assert terms >= 1, f"terms: expected the number of roundings, got {terms}"
    actual, truth, eager = (t.detach().double().cpu() for t in (actual, truth, eager))
    _check_shape(actual, truth, what)
    slack = roundoff(torch.float32) * math.sqrt(terms)
    for size, times in ((_norm, factor), (_largest, factor * WORST / FACTOR)):
        ours, theirs, unit = size(actual - truth), size(eager - truth), size(truth)
        if not ours <= times * theirs + slack * unit:
            _fail(actual, truth, f"{what}: {size.__name__[1:]} of the error {ours:.3e}, of eager's {theirs:.3e} ("
                  f"{times:g} x allowed), of the truth {unit:.3e} ({slack:.1e} x allowed)")  # fmt: skip


def assert_same(actual, expected, terms, what="", scale=None):
    """Law 2. ``terms`` is n; ``scale`` the size of what is summed, where cancellation leaves less: the largest element
    of ``expected`` otherwise."""
    assert terms >= 1, f"terms: expected the number of roundings, got {terms}"
    bound = 2 * terms * roundoff(actual.dtype, expected.dtype)
    actual, expected = (t.detach().double().cpu() for t in (actual, expected))
    _check_shape(actual, expected, what)
    unit = _largest(expected if scale is None else torch.as_tensor(scale).detach())
    if not _largest(actual - expected) <= bound * unit:
        found = f"{what}: difference {_largest(actual - expected):.3e}, allowed {bound:.1e} x {unit:.3e}"
        _fail(actual, expected, found)


def _norm(t):
    return float(t.norm())


def _largest(t):
    return float(t.abs().max()) if t.numel() else 0.0


def _check_shape(actual, expected, what):
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"


def _fail(actual, expected, message):
    distance = (actual - expected).abs().nan_to_num(nan=math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape)) if distance.dim() else ()
    pair = f"{float(actual[worst])!r}, expected {float(expected[worst])!r}"
    raise AssertionError(f"{message}; worst at {list(worst)}: {pair}")
