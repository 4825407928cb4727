"""Peak memory of the CPU path: one chunk of logits over inputs and outputs, in a process of its own."""

import subprocess
import sys

import pytest

from prism_kernels.linear_logprob.plan import CPU_CHUNK_BYTES

SLACK = 32_000_000

SCRIPT = """
import resource, torch
from prism_kernels import PolicyObjective, linear_cross_entropy, linear_logprob, linear_objective, linear_policy_loss

def glue(logprob, entropy, rows):
    return logprob.sum(), torch.ones_like(logprob), None

def losses(rows, width, words):
    hidden = torch.randn(rows, width).requires_grad_()
    weight = torch.randn(words, width).requires_grad_()
    targets = torch.randint(0, words, (rows,))
    starts = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
    yield hidden, weight
    yield linear_cross_entropy(hidden, weight, targets)
    yield linear_policy_loss(hidden, weight, targets, torch.randn(2), starts, PolicyObjective(entropy_coef=0.1),
                             old_logprob=torch.randn(rows) - 10, with_entropy=True).loss
    yield linear_logprob(hidden, weight, targets, with_entropy=True).entropy.sum()
    yield linear_objective(hidden, weight, targets, glue) / rows

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def run(rows, width, words):
    steps = losses(rows, width, words)
    hidden, weight = next(steps)
    before = resident()
    for loss in steps:
        loss.backward()
        hidden.grad = weight.grad = None
    outputs = 4 * (hidden.numel() + weight.numel())
    # Not ru_maxrss, which survives exec: it would be that of the process which started this one, if larger.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before - outputs

run(8, 8, 16)  # what a first call loads is not what a step needs
print(run({rows}, {width}, {words}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rows,width", [(1536, 32), (320, 1024)])
def test_peak_is_one_chunk(rows, width):
    """200 MB of logits, four times that in eager torch, at a width that saves time; then 134 MB of dW, never twice."""
    script = SCRIPT.format(rows=rows, width=width, words=32_768)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout) <= CPU_CHUNK_BYTES + SLACK
