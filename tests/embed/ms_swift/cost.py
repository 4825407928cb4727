"""The log-probs of a step in ms-swift: its own method, ours. ``python -m tests.embed.ms_swift.cost [WAY]`` -> JSON.

B sequences of L tokens, K of them predicted, H hidden sizes, V words: log-probs, entropies, and the gradient of a sum
of both. WAY is theirs or ours, whose peak memory is told; without it both in turn, round by round, in CPU seconds.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from torch import nn

from prism_kernels.integrations import ms_swift

B, L, K, H, V = 4, 1100, 1024, 64, 32768
ROUNDS = 3
METHOD = "_get_logps_via_local_forward"


class Head(nn.Module):
    """The end of a model: its head alone, on hidden sizes that are given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config, self.lm_head = SimpleNamespace(), nn.Linear(H, V, bias=False)
        self.hidden = nn.Parameter(torch.randn(B, L, H))

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, logits_to_keep):
        return SimpleNamespace(logits=self.lm_head(self.hidden[:, -logits_to_keep:]))


def step(method, model, tokens):
    """(loss, gradients) and CPU seconds."""
    trainer = SimpleNamespace(
        model_kwarg_keys=("logits_to_keep",), temperature=1.0, template=SimpleNamespace(padding_free=False)
    )
    start = time.process_time()
    logprob, entropy = method(trainer, model, {"input_ids": tokens}, K, tokens, compute_entropy=True)
    loss = logprob.mean() + 0.01 * entropy.mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), [float(g.norm()) for g in gradients], time.process_time() - start


def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(way):
    torch.set_num_threads(1)
    theirs = getattr(GRPOTrainer, METHOD)
    ms_swift.install()
    methods = {"theirs": theirs, "ours": getattr(GRPOTrainer, METHOD)}
    model = Head()
    tokens = torch.randint(V, (B, L))
    before, found = peak(), {}
    for _ in range(ROUNDS if way is None else 1):
        for name in methods if way is None else [way]:
            loss, norms, seconds = step(methods[name], model, tokens)
            found.setdefault(name, {"loss": loss, "norms": norms, "seconds": []})["seconds"].append(seconds)
    print(json.dumps({"bytes": peak() - before, **found}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
