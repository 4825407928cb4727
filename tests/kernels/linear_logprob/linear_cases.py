"""Inputs and implementations of the LM-head tests.

The Triton kernels run on a GPU where there is one. Elsewhere the same tests run them in Triton's interpreter, in a
process of its own: tests/kernels/linear_logprob/test_triton.py starts it.
"""

import os
from dataclasses import dataclass

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    IMPLS = [("triton", "cpu")]
else:
    IMPLS = [("reference", "cpu"), ("cpu", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
ENGINES = [impl for impl in IMPLS if impl != ("reference", "cpu")]  # those that work in chunks

skip_interpreted = pytest.mark.skipif(INTERPRETED, reason="about the host's side, tested outside the interpreter")


@dataclass
class Case:
    """Head inputs on a device; ``leaves`` want gradients."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor

    @property
    def leaves(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def terms(self):
        """Roundings on the way to a gradient (tests/oracle.py): a logit, its softmax, then a sum over words or rows."""
        rows, words, width = *self.targets.shape, *self.weight.shape
        return width + words + max(words, rows)


def make(rows, words, device="cpu", dtype=torch.float32, width=16, bias=False, skipped=0.2, seed=0):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(device, dtype).requires_grad_()

    targets = torch.randint(0, words, (rows,), generator=random)
    targets[torch.rand(rows, generator=random) < skipped] = -100
    return Case(normal(rows, width), normal(words, width), normal(words) if bias else None, targets.to(device))


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True)
