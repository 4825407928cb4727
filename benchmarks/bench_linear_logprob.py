"""The LM head: log-probs (with entropy forward; forward and backward), cross-entropy, policy loss.

F1 = one product T x H times H x V of the library, measured in the same run; forward and backward need three.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import prism_kernels
from benchmarks.__main__ import main
from benchmarks.harness import Contender, Problem, Tolerance
from benchmarks.linear_data import CLIP, Head, make_head, truth_logprob, truth_loss, weighted
from benchmarks.linear_peers import cross_entropy_peers, entropy_peers, logprob_peers, policy_peers, with_gradients
from benchmarks.peers import need_gpu

TESTS = [
    "tests/kernels/linear_logprob/test_linear_logprob.py",
    "tests/kernels/linear_logprob/test_contract.py",
    "tests/kernels/linear_logprob/test_linear_policy_loss.py",
    "tests/kernels/linear_logprob/test_triton.py",
    "tests/kernels/linear_logprob/test_gpu.py",
]
TINY = {"T": 48, "H": 16, "V": 509}
SHAPES: dict[str, list[dict[str, Any]]] = {
    "published": [{"T": 8192, "H": 2560, "V": 151936, "dtype": "bf16"}],
    "cpu": [{"T": 4096, "H": 512, "V": 32768, "dtype": "fp32"}],
    "tiny": [{**TINY, "dtype": "fp32"}],
}
GPU_PART = ("linear", 95)  # its name in `make gpu`, and its seconds
GPU_ARGUMENTS = ["--seconds", "4"]
SMALL_CHUNK = 512 << 20

# (ours, peers): ours rounds its results to the dtype once; peers round logits too, which shows as an error.
_LOGPROB = {"bf16": (1e-3, 0.25), "fp16": (1e-3, 0.1), "fp32": (1e-4, 1e-2)}
_GRADIENT = {"bf16": (5e-3, 5e-2), "fp16": (2e-3, 5e-2), "fp32": (1e-5, 1e-2)}


def sweep(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """The same shape at a quarter to twice as many rows."""
    return [{**shape, "T": max(1, int(shape["T"] * factor))} for factor in (0.25, 0.5, 1, 2)]


def problems(shape: dict[str, Any], device: torch.device) -> list[Problem]:
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
            [*_ours(head, _policy_loss), *limits, *policy_peers(head)], lambda: truth_loss(head, "policy"),
            losses, limit=("one product", 3),
        ),
        Problem(
            "logprob_entropy", "log-probs and entropy, forward", shape, product, read + 12.0 * rows,
            [_entropy(head), limits[0], *entropy_peers(head)], lambda: truth_logprob(head),
            {"logprob": logprob, "entropy": logprob}, limit=("one product", 1),
        ),
        Problem(
            "cross_entropy", "cross-entropy, forward + backward", shape, 3 * product, 2 * read,
            [*_ours(head, _cross_entropy), *limits, *cross_entropy_peers(head)], lambda: truth_loss(head, "nll"),
            losses, limit=("one product", 3),
        ),
        Problem(
            "logprob", "log-probs, forward + backward of any loss of them", shape, 3 * product, 2 * read,
            [Contender("prism", lambda: with_gradients(head, _logprob(head)), "ours"), *limits, *logprob_peers(head)],
            lambda: truth_loss(head, "weighted"), losses, limit=("one product", 3),
        ),
    ]  # fmt: skip


def _logprob(head: Head) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden, weight: weighted(head, prism_kernels.linear_logprob(hidden, weight, head.targets).logprob)


def _entropy(head: Head) -> Contender:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        out = prism_kernels.linear_logprob(head.hidden, head.weight, head.targets, with_entropy=True)
        return {"logprob": out.logprob, "entropy": out.entropy}

    return Contender("prism", lambda: call, "ours")


def _cross_entropy(head: Head, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden, weight: prism_kernels.linear_cross_entropy(hidden, weight, head.targets, **options)


def _policy_loss(head: Head, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    objective = prism_kernels.PolicyObjective.grpo(clip_low=CLIP, clip_high=CLIP)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return prism_kernels.linear_policy_loss(
            hidden, weight, head.targets, head.advantages, head.sequence_start, objective,
            old_logprob=head.old_logprob, **options,
        ).loss  # fmt: skip

    return loss


def _ours(head: Head, make: Callable) -> list[Contender]:
    def small() -> Callable[[], dict[str, Tensor]]:
        need_gpu(head.hidden.device)
        return with_gradients(head, make(head, chunk_bytes=SMALL_CHUNK))

    return [
        Contender("prism", lambda: with_gradients(head, make(head)), "ours"),
        Contender("prism, 0.5 GB chunk", small, "ours"),
    ]


def _limits(head: Head) -> list[Contender]:
    def one() -> Callable[[], dict[str, Tensor]]:
        x, w = head.hidden.detach(), head.weight.detach()
        z = x.new_empty(x.shape[0], w.shape[0])
        return lambda: {"z": torch.mm(x, w.T, out=z)}

    def three() -> Callable[[], dict[str, Tensor]]:
        x, w = head.hidden.detach(), head.weight.detach()
        z, dx, dw = x.new_empty(x.shape[0], w.shape[0]), torch.empty_like(x), torch.empty_like(w)

        def call() -> dict[str, Tensor]:
            torch.mm(x, w.T, out=z)
            torch.mm(z, w, out=dx)
            torch.mm(z.T, x, out=dw)
            return {}

        return call

    return [Contender("one product", one, "limit"), Contender("three products", three, "limit")]


if __name__ == "__main__":
    sys.exit(main(["linear_logprob", *sys.argv[1:]]))
