"""What log-probs cost in verl: full logits, its fused torch backend, ours. ``python -m tests.embed.verl.cost`` -> JSON.

N tokens of a policy of hidden size H with V words, fp32, one thread: log-probs, entropies, and the gradient of a sum of
both. The three take turns; the peak of each is read off the kernel's own mark, which is set back before every turn.
"""

import ctypes
import json
import statistics
import time
from pathlib import Path

import torch
from verl.utils import torch_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO

N, H, V = 4096, 64, 32768
ROUNDS = 2


def full(hidden, weight, ids):
    logits = hidden @ weight.T
    return torch_functional.logprobs_from_logits(logits, ids), torch_functional.entropy_from_logits(logits)


WAYS = {"full": full, "fused": FusedLinearForPPO.prism_theirs().forward, "ours": FusedLinearForPPO().forward}


def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def turn(run, hidden, weight, ids, upstream):
    ctypes.CDLL(None).malloc_trim(0)  # what the turn before freed
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM: from here on
    before, start = status("VmRSS"), time.process_time()
    logprob, entropy = run(hidden, weight, ids)
    loss = (upstream * logprob).mean() + 0.01 * entropy.mean()
    gradients = torch.autograd.grad(loss, [hidden, weight])
    seconds = time.process_time() - start
    return {"bytes": status("VmHWM") - before, "seconds": seconds, "loss": loss.item()}, gradients


def measured(tokens=N, rounds=ROUNDS):
    """{way: its medians, its loss, and how far its gradients are from those by full logits}."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, H, requires_grad=True), torch.randn(V, H).mul_(0.1).requires_grad_()
    ids, upstream = torch.randint(V, (tokens,)), torch.randn(tokens)
    found = {way: [] for way in WAYS}
    for _ in range(rounds):
        expected = None
        for way, run in WAYS.items():
            row, gradients = turn(run, hidden, weight, ids, upstream)
            expected = expected or gradients
            row["gradients"] = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients, expected))
            found[way].append(row)
    return {way: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for way, rows in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measured()))
