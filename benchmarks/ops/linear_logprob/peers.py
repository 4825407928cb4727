"""The peers of the LM head, each as its users call it. What gives log-probs alone gets the loss in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.measure import Unavailable
from benchmarks.harness.op import Call, Contender, Outputs
from benchmarks.harness.peers import need, needed, stand_in
from benchmarks.ops.linear_logprob.data import CLIP, Head, Loss, policy_glue, weighted

COMPILED = "torch.compile"
Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (T, H), (V, H) -> log-prob, entropy


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(T,)"""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def eager_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def eager_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _verl(head: Head) -> Pair:
    module = "verl.utils.kernel.linear_cross_entropy"
    op = needed(module, "linear_cross_entropy", "verl", head.hidden.device, alone=True)
    return lambda hidden, weight: op(hidden, weight, head.targets, 1.0, "none")


def _trl(head: Head, entropy: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    op = needed("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", "trl").apply
    # Its backward imports one function of its trainers (accelerate, datasets, ...): it gathers a head that DeepSpeed
    # split, and there is none here.
    stand_in("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *parameters: nullcontext())
    chunk = 32768  # words, as its trainers pass
    outputs = ("entropy",) if entropy else ()
    return lambda hidden, weight: op(hidden, weight, None, head.targets, 1.0, chunk, None, 1.0, outputs)


def _liger_scaled(head: Head, entropy: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, ...] | Tensor]:
    op = needed("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction", "liger-kernel").apply
    device = head.hidden.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        # What it loads at the first call on Hopper, where it has no other path: needs nvidia-cutlass-dsl.
        need("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", "liger-kernel")
        if head.hidden.dtype != torch.bfloat16:
            raise Unavailable("takes bf16 alone on Hopper")
    return lambda hidden, weight: op(hidden, weight, head.targets, 1.0, -100, 1, entropy)


def _cce(head: Head, reduction: str) -> Loss:
    op = needed("cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy", head.hidden.device)
    return lambda hidden, weight: op(hidden, weight, head.targets, reduction=reduction)


def _liger_grpo(head: Head) -> Loss:
    make = needed("liger_kernel.chunked_loss.grpo_loss", "LigerFusedLinearGRPOLoss", "liger-kernel")
    rows, count = head.hidden.shape[0], head.advantages.shape[0]
    if rows % count:
        raise Unavailable("needs sequences of one length")
    compiled = head.hidden.device.type == "cuda"
    bounds = {"epsilon_low": CLIP, "epsilon_high": CLIP}
    op = make(beta=0.0, use_ref_model=False, loss_type="bnpo", compiled=compiled, **bounds)
    targets, old = head.targets.view(count, -1), head.old_logprob.view(count, -1)
    mask = torch.ones_like(targets)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rows_by_sequence = hidden.view(count, -1, hidden.shape[1])
        return op(rows_by_sequence, weight, targets, mask, head.advantages, old_per_token_logps=old)[0]

    return loss


def _negated(loss: Loss) -> Loss:
    return lambda hidden, weight: -loss(hidden, weight)


def _first(pair: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> Loss:
    return lambda hidden, weight: pair(hidden, weight)[0]


# What gives log-probs, (T, H), (V, H) -> (T,).
LOGPROB: dict[str, Callable[[Head], Loss]] = {
    "Liger scaled CE": lambda head: _negated(_liger_scaled(head, False)),
    "verl linear_cross_entropy (Triton)": lambda head: _first(_verl(head)),
    "TRL chunked head": lambda head: _first(_trl(head, False)),
    "cut-cross-entropy": lambda head: _negated(_cce(head, "none")),
}


def _with_targets(head: Head, op: Callable) -> Callable:
    return lambda hidden, weight: op(hidden, weight, head.targets)


def entropy(head: Head) -> list[Contender]:
    """Forward alone: {"logprob", "entropy"}."""

    def scaled() -> Pair:
        op = _liger_scaled(head, True)

        def negated(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            nll, entropy = op(hidden, weight)
            return -nll, entropy

        return negated

    def prepare(make: Callable[[], Pair]) -> Call:
        op = make()

        @torch.no_grad()
        def call() -> Outputs:
            logprob, entropy = op(head.hidden, head.weight)[:2]
            return {"logprob": logprob, "entropy": entropy}

        return call

    makes: dict[str, Callable[[], Pair]] = {
        "torch eager": lambda: _with_targets(head, eager_entropy),
        COMPILED: lambda: _with_targets(head, torch.compile(eager_entropy)),
        "verl linear_cross_entropy (Triton)": lambda: _verl(head),
        "TRL chunked head": lambda: _trl(head, True),
        "Liger scaled CE": scaled,
    }
    return _contenders(makes, prepare)


def cross_entropy(head: Head) -> list[Contender]:
    def package(module: str, name: str, package: str) -> Loss:
        return _with_targets(head, needed(module, name, package, head.hidden.device))

    liger = ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", "liger-kernel")
    quack = ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", "quack-kernels")
    own = {
        "torch eager": lambda: _with_targets(head, eager_cross_entropy),
        COMPILED: lambda: _with_targets(head, torch.compile(eager_cross_entropy)),
        "Liger fused linear CE": lambda: package(*liger),
        "cut-cross-entropy": lambda: _cce(head, "mean"),
        "quack-kernels chunked linear CE": lambda: package(*quack),
    }
    return _losses(head, lambda logprob: -logprob.mean(), own)


def policy_loss(head: Head) -> list[Contender]:
    own = {"Liger fused linear GRPO": lambda: _liger_grpo(head)}
    return _losses(head, lambda logprob: policy_glue(head, logprob), own)


def logprob(head: Head) -> list[Contender]:
    return _losses(head, lambda logprob: weighted(head, logprob), {})


def _losses(head: Head, glue: Callable[[Tensor], Tensor], own: dict[str, Callable[[], Loss]]) -> list[Contender]:
    """``own`` losses, and ``glue`` of whatever gives log-probs."""

    def glued(logprob: Loss) -> Loss:
        return lambda hidden, weight: glue(logprob(hidden, weight))

    plain = glued(_with_targets(head, eager))
    makes = {"torch eager": lambda: plain, COMPILED: lambda: torch.compile(plain), **own}
    for name, make in LOGPROB.items():
        makes.setdefault(name, lambda make=make: glued(make(head)))
    return _contenders(makes, lambda make: head.gradients(make()))


def _contenders(makes: dict[str, Callable], prepare: Callable[[Callable], Call]) -> list[Contender]:
    return [Contender(name, partial(prepare, make), compiles=name == COMPILED) for name, make in makes.items()]
