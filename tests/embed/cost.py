"""What a step's log-probs cost in TRL: full logits, its chunks, ours. ``python -m tests.embed.cost WAY`` -> JSON.

N tokens of a policy with H hidden sizes and V words: log-probs, entropies, and the gradient of a sum of both.
"""

import json
import sys
import time
from pathlib import Path

import torch
from trl.trainer import utils

from prism_kernels.integrations import trl as prism_trl

N, H, V = 4096, 64, 32768
REPEATS = 2


def full(hidden, weight, targets):
    logits = hidden @ weight.T
    return utils.selective_log_softmax(logits, targets), utils.entropy_from_logits(logits)


def chunked(hidden, weight, targets):
    outputs = ("log_probs", "entropy")
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, outputs)[:2]


def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main(way):
    torch.set_num_threads(1)
    if way == "ours":
        prism_trl.install()
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H).mul_(0.1).requires_grad_()
    targets, upstream = torch.randint(V, (N,)), torch.randn(N)
    run = full if way == "full" else chunked
    before, seconds = status("VmRSS"), []
    for _ in range(REPEATS):
        start = time.process_time()
        logprob, entropy = run(hidden, weight, targets)
        loss = (upstream * logprob).mean() + 0.01 * entropy.mean()
        gradients = torch.autograd.grad(loss, [hidden, weight])
        seconds.append(time.process_time() - start)
    norms = [float(g.norm()) for g in gradients]
    print(json.dumps({"bytes": status("VmHWM") - before, "seconds": min(seconds), "loss": loss.item(), "norms": norms}))


if __name__ == "__main__":
    main(sys.argv[1])
