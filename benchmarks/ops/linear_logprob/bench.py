"""The LM head: log-probs (with entropy forward; forward and backward), cross-entropy, policy loss.

One product T x H times H x V of the library, measured in the same run, is the limit; forward and backward need three.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import prism_kernels
from benchmarks.harness.op import Call, Contender, Op, Outputs, Problem, Shape, Tolerance
from benchmarks.harness.peers import need_gpu
from benchmarks.ops.linear_logprob import peers
from benchmarks.ops.linear_logprob.data import CLIP, Head, Loss, make_head, truth_logprob, truth_loss, weighted

SMALL_CHUNK = 512 << 20

# (ours, peers): ours rounds its results to the dtype once; peers round logits too, which shows as an error.
_LOGPROB = {"bf16": (1e-3, 0.25), "fp16": (1e-3, 0.1), "fp32": (1e-4, 1e-2)}
_GRADIENT = {"bf16": (5e-3, 5e-2), "fp16": (2e-3, 5e-2), "fp32": (1e-5, 1e-2)}


def problems(shape: Shape, device: torch.device) -> list[Problem]:
    head = make_head(shape, device)
    rows, width, words = shape["T"], shape["H"], shape["V"]
    item = head.hidden.element_size()
    product, read = 2.0 * rows * width * words, float((rows + words) * width * item)
    logprob, gradient = Tolerance("max", *_LOGPROB[shape["dtype"]]), Tolerance("relative", *_GRADIENT[shape["dtype"]])
    losses = {"loss": Tolerance("relative", 1e-3, 5e-2), "dx": gradient, "dw": gradient}
    limits = _limits(head)
    return [
        Problem(
            "policy_loss", "clipped policy loss, forward + backward", shape, 3 * product, 2 * read,
            [*_ours(head, _policy_loss), *limits, *peers.policy_loss(head)], lambda: truth_loss(head, "policy"),
            losses, limit=("one product", 3),
        ),
        Problem(
            "logprob_entropy", "log-probs and entropy, forward", shape, product, read + 12.0 * rows,
            [_entropy(head), limits[0], *peers.entropy(head)], lambda: truth_logprob(head),
            {"logprob": logprob, "entropy": logprob}, limit=("one product", 1),
        ),
        Problem(
            "cross_entropy", "cross-entropy, forward + backward", shape, 3 * product, 2 * read,
            [*_ours(head, _cross_entropy), *limits, *peers.cross_entropy(head)], lambda: truth_loss(head, "nll"),
            losses, limit=("one product", 3),
        ),
        Problem(
            "logprob", "log-probs, forward + backward of any loss of them", shape, 3 * product, 2 * read,
            [Contender("prism", lambda: head.gradients( _logprob(head)), "ours"), *limits, *peers.logprob(head)],
            lambda: truth_loss(head, "weighted"), losses, limit=("one product", 3),
        ),
    ]  # fmt: skip


def _logprob(head: Head) -> Loss:
    return lambda hidden, weight: weighted(head, prism_kernels.linear_logprob(hidden, weight, head.targets).logprob)


def _entropy(head: Head) -> Contender:
    @torch.no_grad()
    def call() -> Outputs:
        out = prism_kernels.linear_logprob(head.hidden, head.weight, head.targets, with_entropy=True)
        return {"logprob": out.logprob, "entropy": out.entropy}

    return Contender("prism", lambda: call, "ours")


def _cross_entropy(head: Head, **options: Any) -> Loss:
    return lambda hidden, weight: prism_kernels.linear_cross_entropy(hidden, weight, head.targets, **options)


def _policy_loss(head: Head, **options: Any) -> Loss:
    objective = prism_kernels.PolicyObjective.grpo(clip_low=CLIP, clip_high=CLIP)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return prism_kernels.linear_policy_loss(
            hidden, weight, head.targets, head.advantages, head.sequence_start, objective,
            old_logprob=head.old_logprob, **options,
        ).loss  # fmt: skip

    return loss


def _ours(head: Head, make: Callable[..., Loss]) -> list[Contender]:
    def small() -> Call:
        need_gpu(head.hidden.device)
        return head.gradients(make(head, chunk_bytes=SMALL_CHUNK))

    return [
        Contender("prism", lambda: head.gradients(make(head)), "ours"),
        Contender("prism, 0.5 GB chunk", small, "ours"),
    ]


def _limits(head: Head) -> list[Contender]:
    def products(count: int) -> Call:
        x, w = head.hidden.detach(), head.weight.detach()
        z = x.new_empty(x.shape[0], w.shape[0])
        factors = ((x, w.T, z), (z, w, torch.empty_like(x)), (z.T, x, torch.empty_like(w)))[:count]

        def call() -> Outputs:
            for a, b, out in factors:
                torch.mm(a, b, out=out)
            return {}

        return call

    counts = {"one product": 1, "three products": 3}
    return [Contender(name, partial(products, count), "limit") for name, count in counts.items()]


BENCH = Op(
    op="linear_logprob",
    description=__doc__,
    problems=problems,
    names=("policy_loss", "logprob_entropy", "cross_entropy", "logprob"),
    shapes={
        "published": [{"T": 8192, "H": 2560, "V": 151936, "dtype": "bf16"}],
        "cpu": [{"T": 4096, "H": 512, "V": 32768, "dtype": "fp32"}],
        "tiny": [{"T": 48, "H": 16, "V": 509, "dtype": "fp32"}],
    },
    tiny={"T": 48, "H": 16, "V": 509},
    # A quarter to twice as many rows.
    sweep=lambda shape: [{**shape, "T": max(1, int(shape["T"] * factor))} for factor in (0.25, 0.5, 1, 2)],
)
