"""The contract of the LM-head ops: arguments, their checks, and the choice of an implementation.

T rows, V vocab size, H hidden, R unmasked rows, S sequences. Rows of ``targets`` that hold -100 are skipped everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prism_kernels.checks import flag, wrong
from prism_kernels.dispatch import Impl, Implementation, Op, choose, implementation, need_triton, untransformed
from prism_kernels.linear_logprob import autograd
from prism_kernels.linear_logprob.checks import (
    Scaling,
    as_scalar,
    check_also,
    check_head,
    check_policy,
    check_rows,
    chunk_size,
)
from prism_kernels.linear_logprob.objectives import PolicyObjective
from prism_kernels.linear_logprob.records import (
    CrossEntropyBatch,
    Glue,
    Head,
    LinearLogprob,
    Options,
    PolicyBatch,
    PolicyLoss,
)


def _table(name: str) -> Op:
    return Op(
        name,
        [
            Implementation(
                Impl.TRITON,
                "prism_kernels.linear_logprob.triton_kernel:ROW_KERNELS",
                ("cuda",),
                need_triton,
                fake=name != "linear_objective",  # a Function, which no operator's fake stands for
            ),
            Implementation(Impl.CPU, "prism_kernels.linear_logprob.cpu_kernel:ROW_KERNELS", ("cpu",)),
            Implementation(Impl.REFERENCE, f"prism_kernels.linear_logprob.reference:{name}", ("cpu", "cuda")),
        ],
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
    forbidden: Sequence[int] = (),
    vocab_size: int | None = None,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
    impl: str | Impl = "auto",
    logit_scale: float = 1.0,
    also: Sequence[str] = (),
) -> LinearLogprob:
    """Log-probability of each row's target, log-sum-exp and entropy of its logits.

    ``z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature``;
    ``logprob = z.log_softmax(-1).gather(-1, targets)``, ``logsumexp = z.logsumexp(-1)``,
    ``entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)``, all differentiable in hidden, weight and bias.

    Args:
        hidden: (T, H), any floating dtype. weight: (V, H), the dtype of hidden. bias: (V,) or None.
        targets: (T,) int64 in [0, V), or -100 to skip the row: its outputs are 0 and it has no gradient.
        temperature: > 0. softcap: > 0 or None (Gemma 2, arXiv 2408.00118).
        forbidden: ids in [0, V) that have probability 0, as in :func:`sample_tokens`: z is -inf there, and no target is
            one of them. A few: a GPU's programs walk over them.
        vocab_size: ids from there on have probability 0 (an embedding may hold more rows than words). Default V.
        chunk_bytes: most bytes of fp32 logits at a time (one row at least); None: 48 MB on a CPU, a thirtieth of the
            memory of a GPU. The reference keeps all logits.
        logit_scale: > 0: multiplies hidden @ weight.T + bias, before softcap and temperature (Cohere's and, as a
            divisor, Granite's). Costs nothing: it is the same as another temperature and another softcap.
        also: further statistics of the same pass over the words, among "is_top1" (bool: ``z.argmax(-1) == targets``),
            "mean_logits" (``z.mean(-1)``, of the ids that are allowed) and "log_sum_sq_probs"
            (``z.softmax(-1).square().sum(-1).log()``), the logits, guesses and p^2 that trainers log or weigh by.
            Constants: no gradient goes through them.
    Returns:
        LinearLogprob(logprob, logsumexp, entropy | None), each (T,), fp32 (fp64 for fp64 inputs), natural logarithms.
        With ``also`` a LinearLogprobAlso: these three, then is_top1, mean_logits, log_sum_sq_probs, None where unasked.
    Raises:
        ValueError: shapes, dtypes, ranges; targets outside [0, V) or of probability 0 where the host can see them (on a
            CPU; on a GPU such a row gives NaN).
        RuntimeError: ``impl`` cannot run here.
    """
    scaling = Scaling(temperature, softcap, logit_scale)
    head = check_head(hidden, weight, targets, bias, scaling, forbidden, vocab_size)
    options = Options(flag("with_entropy", with_entropy), chunk_bytes=chunk_size(chunk_bytes))
    return _run("linear_logprob", impl, head, targets, options, check_also(also))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    forbidden: Sequence[int] = (),
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    impl: str | Impl = "auto",
    logit_scale: float = 1.0,
) -> Tensor:
    """``sum(row_weight * F.cross_entropy(logits, targets, reduction="none")) / normalizer`` over unmasked rows.

    Args:
        hidden, weight, targets, bias, softcap, forbidden, vocab_size, logit_scale: as in :func:`linear_logprob`.
        row_weight: (T,) floating, a constant (no gradient), or None for ones.
        normalizer: number or 0-d tensor; default the number of unmasked rows. Ranks pass the global one.
    Returns:
        0-d loss, fp32 (fp64 for fp64 inputs). No unmasked row: 0, with zero gradients.
    Raises:
        ValueError, RuntimeError: as :func:`linear_logprob`.
    """
    scaling = Scaling(1.0, softcap, logit_scale)
    head = check_head(hidden, weight, targets, bias, scaling, forbidden, vocab_size)
    check_rows("row_weight", row_weight, head, host=True)
    batch = CrossEntropyBatch(targets, row_weight, as_scalar("normalizer", normalizer, hidden))
    return _run("linear_cross_entropy", impl, head, batch, Options(chunk_bytes=chunk_size(chunk_bytes)))


def linear_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    glue: Glue,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    forbidden: Sequence[int] = (),
    vocab_size: int | None = None,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
    impl: str | Impl = "auto",
    logit_scale: float = 1.0,
) -> Tensor:
    """Any objective that is a function of the rows' log-probs and entropies, in three GEMMs.

    Args:
        hidden, weight, targets, bias, temperature, softcap, forbidden, vocab_size, logit_scale: as in
            :func:`linear_logprob`.
        glue: ``glue(logprob (R,), entropy (R,) | None, rows (R,) int64) -> (loss, dloss_dlogprob (R,),
            dloss_dentropy (R,) | None)``; ``rows`` index the input, skipped rows are absent. Runs without grad, once
            per chunk of rows; their losses add up. :func:`~prism_kernels.linear_logprob.cispo` is an example.
        with_entropy: hand the entropies to glue.
    Returns:
        0-d loss, fp32 (fp64 for fp64 inputs), differentiable in hidden, weight and bias.
    Raises:
        ValueError, RuntimeError: as :func:`linear_logprob`.
    """
    scaling = Scaling(temperature, softcap, logit_scale)
    head = check_head(hidden, weight, targets, bias, scaling, forbidden, vocab_size)
    if not callable(glue):
        raise wrong("glue", "a function (logprob, entropy, rows) -> ...", f"a {type(glue).__name__}")
    options = Options(flag("with_entropy", with_entropy), chunk_bytes=chunk_size(chunk_bytes))
    return _run("linear_objective", impl, head, targets, glue, options)


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
    forbidden: Sequence[int] = (),
    vocab_size: int | None = None,
    with_entropy: bool = False,
    with_logprob: bool = True,
    chunk_bytes: int | None = None,
    impl: str | Impl = "auto",
    logit_scale: float = 1.0,
) -> PolicyLoss:
    """Policy-gradient loss of packed sequences; the formula is in linear_logprob/README.md.

    Args:
        hidden, weight, targets, bias, temperature, softcap, forbidden, vocab_size, logit_scale: as in
            :func:`linear_logprob`.
        advantages: (S,), or (T,) where T differs from S. A constant.
        sequence_start: (S + 1,) int32: rows [sequence_start[i], sequence_start[i + 1]) are sequence i; from 0 to T.
        objective: a :class:`PolicyObjective`.
        old_logprob: (T,) of the policy that sampled, like the next two a constant; None: on-policy, the ratio is 1.
        ref_logprob: (T,) of the reference policy; needed where kl_coef is not 0, else only a statistic.
        rollout_logprob: (T,) as the sampler reported them; needed by importance_cap, else only a statistic.
        normalizer: number or 0-d tensor: replaces the number of rows (token_mean) or of sequences (other aggregates).
            Ranks pass the global one.
        with_entropy: return the entropies.
        with_logprob: return the log-probs; False allows rows of zero advantage to be dropped before the GEMMs (only
            if kl_coef = entropy_coef = 0 and ratio = "token").
    Returns:
        PolicyLoss(loss, logprob | None, entropy | None, stats). No unmasked row: loss 0, with zero gradients.
    Raises:
        ValueError, RuntimeError: as :func:`linear_logprob`; ValueError for importance_cap without rollout_logprob
        and for kl_coef without ref_logprob.
    """
    scaling = Scaling(temperature, softcap, logit_scale)
    head = check_head(hidden, weight, targets, bias, scaling, forbidden, vocab_size)
    divisor = as_scalar("normalizer", normalizer, hidden)
    batch = PolicyBatch(targets, advantages, sequence_start, old_logprob, ref_logprob, rollout_logprob, divisor)
    check_policy(head, batch, objective)
    options = Options(flag("with_entropy", with_entropy), flag("with_logprob", with_logprob), chunk_size(chunk_bytes))
    return _run("linear_policy_loss", impl, head, batch, objective, options)


def _run(op: str, impl: str | Impl, head: Head, *arguments: Any) -> Any:
    """The reference is the whole op; of any other implementation the table holds the engine's row kernels."""
    chosen = choose(op, str(impl), head.hidden.device.type)
    tensors = (head.hidden, head.weight, head.bias)
    _OPS[op].check_transforms(chosen, *tensors)
    if chosen == Impl.REFERENCE:
        return implementation(op, chosen)(head, *arguments)
    run = getattr(autograd, op)
    if not torch.compiler.is_compiling():
        run = untransformed(run, *tensors)
    return run(head, *arguments, chosen)
