"""The peers of the LM-head benchmarks, each as its users call it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Contender
from benchmarks.linear_data import CLIP, Head, policy_glue, weighted
from benchmarks.measure import Unavailable
from benchmarks.peers import attribute, need, need_alone, stand_in

LogProbs = Callable[[Tensor, Tensor], Tensor]


def with_gradients(head: Head, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Forward and backward: {"loss", "dx", "dw"}; nothing accumulates from call to call."""

    def call() -> dict[str, Tensor]:
        value = loss(head.hidden, head.weight)
        dx, dw = torch.autograd.grad(value, head.leaves)
        return {"loss": value.detach(), "dx": dx, "dw": dw}

    return call


def eager_logprob_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def eager_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def eager_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _verl(head: Head) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    module = need_alone("verl.utils.kernel.linear_cross_entropy", "verl", head.hidden.device)
    op = attribute(module, "linear_cross_entropy", "verl")
    return lambda hidden, weight: op(hidden, weight, head.targets, 1.0, "none")


def _trl(head: Head, entropy: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    module = need("trl.kernels.chunked_logprob", "trl")
    op = attribute(module, "ChunkedLogProbFunction", "trl").apply
    # Its backward imports one function of its trainers (accelerate, datasets, ...): it gathers a head that DeepSpeed
    # split, and there is none here.
    stand_in("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *parameters: nullcontext())
    chunk = 32768  # words, as its trainers pass
    outputs = ("entropy",) if entropy else ()
    return lambda hidden, weight: op(hidden, weight, None, head.targets, 1.0, chunk, None, 1.0, outputs)


def _liger_scaled(head: Head, entropy: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, ...] | Tensor]:
    module = need("liger_kernel.ops", "liger-kernel")
    op = attribute(module, "LigerFusedLinearScaledCrossEntropyFunction", "liger-kernel").apply
    device = head.hidden.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        # What it loads at the first call on Hopper, where it has no other path: needs nvidia-cutlass-dsl.
        need("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", "liger-kernel")
        if head.hidden.dtype != torch.bfloat16:
            raise Unavailable("takes bf16 alone on Hopper")
    return lambda hidden, weight: op(hidden, weight, head.targets, 1.0, -100, 1, entropy)


def _cce(head: Head, reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    module = need("cut_cross_entropy", "cut-cross-entropy", head.hidden.device)
    op = attribute(module, "linear_cross_entropy", "cut-cross-entropy")
    return lambda hidden, weight: op(hidden, weight, head.targets, reduction=reduction)


def _liger_grpo(head: Head) -> Callable[[Tensor, Tensor], Tensor]:
    module = need("liger_kernel.chunked_loss.grpo_loss", "liger-kernel")
    rows, count = head.hidden.shape[0], head.advantages.shape[0]
    if rows % count:
        raise Unavailable("needs sequences of one length")
    op = attribute(module, "LigerFusedLinearGRPOLoss", "liger-kernel")(
        beta=0.0, use_ref_model=False, loss_type="bnpo", epsilon_low=CLIP, epsilon_high=CLIP,
        compiled=head.hidden.device.type == "cuda",
    )  # fmt: skip
    targets, old = head.targets.view(count, -1), head.old_logprob.view(count, -1)
    mask = torch.ones_like(targets)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rows_by_sequence = hidden.view(count, -1, hidden.shape[1])
        return op(rows_by_sequence, weight, targets, mask, head.advantages, old_per_token_logps=old)[0]

    return loss


def entropy_peers(head: Head) -> list[Contender]:
    """Forward alone: {"logprob", "entropy"}."""

    def named(make: Callable[[], Callable]) -> Callable[[], Callable[[], dict[str, Tensor]]]:
        def prepare():
            op = make()

            @torch.no_grad()
            def call():
                logprob, entropy = op(head.hidden, head.weight)[:2]
                return {"logprob": logprob, "entropy": entropy}

            return call

        return prepare

    def scaled():
        op = _liger_scaled(head, True)

        def negated(hidden, weight):
            nll, entropy = op(hidden, weight)
            return -nll, entropy

        return negated

    def eager():
        return lambda hidden, weight: eager_logprob_entropy(hidden, weight, head.targets)

    def compiled():
        op = torch.compile(eager_logprob_entropy)
        return lambda hidden, weight: op(hidden, weight, head.targets)

    return [
        Contender("torch eager", named(eager)),
        Contender("torch.compile", named(compiled), compiles=True),
        Contender("verl linear_cross_entropy (Triton)", named(lambda: _verl(head))),
        Contender("TRL chunked head", named(lambda: _trl(head, True))),
        Contender("Liger scaled CE", named(scaled)),
    ]


def cross_entropy_peers(head: Head) -> list[Contender]:
    def loss(make: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> Callable:
        return lambda: with_gradients(head, make())

    def compiled():
        op = torch.compile(eager_cross_entropy)
        return lambda hidden, weight: op(hidden, weight, head.targets)

    def liger():
        module = need("liger_kernel.transformers.functional", "liger-kernel", head.hidden.device)
        op = attribute(module, "liger_fused_linear_cross_entropy", "liger-kernel")
        return lambda hidden, weight: op(hidden, weight, head.targets)

    def scaled():
        op = _liger_scaled(head, False)
        return lambda hidden, weight: op(hidden, weight).mean()

    def quack():
        module = need("quack.linear_cross_entropy", "quack-kernels", head.hidden.device)
        op = attribute(module, "chunked_linear_cross_entropy", "quack-kernels")
        return lambda hidden, weight: op(hidden, weight, head.targets)

    def verl():
        op = _verl(head)
        return lambda hidden, weight: -op(hidden, weight)[0].mean()

    def trl():
        op = _trl(head, False)
        return lambda hidden, weight: -op(hidden, weight)[0].mean()

    return [
        Contender("torch eager", loss(lambda: lambda x, w: eager_cross_entropy(x, w, head.targets))),
        Contender("torch.compile", loss(compiled), compiles=True),
        Contender("Liger fused linear CE", loss(liger)),
        Contender("Liger scaled CE", loss(scaled)),
        Contender("cut-cross-entropy", loss(lambda: _cce(head, "mean"))),
        Contender("quack-kernels chunked linear CE", loss(quack)),
        Contender("verl linear_cross_entropy (Triton)", loss(verl)),
        Contender("TRL chunked head", loss(trl)),
    ]


def policy_peers(head: Head) -> list[Contender]:
    """Those that give log-probs alone get the loss in plain torch."""
    glued = _glued(head, policy_glue)
    glued.insert(2, Contender("Liger fused linear GRPO", lambda: with_gradients(head, _liger_grpo(head))))
    return glued


def logprob_peers(head: Head) -> list[Contender]:
    return _glued(head, weighted)


def _glued(head: Head, glue: Callable[[Head, Tensor], Tensor]) -> list[Contender]:
    """Those that give log-probs, with a loss of them in plain torch."""

    def loss(make: Callable[[], LogProbs]) -> Callable:
        def prepare():
            op = make()
            return with_gradients(head, lambda hidden, weight: glue(head, op(hidden, weight)))

        return prepare

    def compiled():
        op = torch.compile(lambda x, w: glue(head, eager_logprob(x, w, head.targets)))
        return with_gradients(head, op)

    def scaled():
        op = _liger_scaled(head, False)
        return lambda hidden, weight: -op(hidden, weight)

    def verl():
        op = _verl(head)
        return lambda hidden, weight: op(hidden, weight)[0]

    def trl():
        op = _trl(head, False)
        return lambda hidden, weight: op(hidden, weight)[0]

    def cce():
        op = _cce(head, "none")
        return lambda hidden, weight: -op(hidden, weight)

    return [
        Contender("torch eager", loss(lambda: lambda x, w: eager_logprob(x, w, head.targets))),
        Contender("torch.compile", compiled, compiles=True),
        Contender("Liger scaled CE", loss(scaled)),
        Contender("verl linear_cross_entropy (Triton)", loss(verl)),
        Contender("TRL chunked head", loss(trl)),
        Contender("cut-cross-entropy", loss(cce)),
    ]
