"""A training forward and backward of a tiny Qwen3: the stock model, and by ``apply_prism_kernels``.

``python -m tests.embed.cost_transformers`` -> JSON. N tokens in sequences of L, V words, fp32, one thread; the two take
turns, and the peak of each is read off the kernel's own mark, which is set back before every turn.
"""

import ctypes
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from prism_kernels.integrations.transformers import apply_prism_kernels

N, L, V = 4096, 512, 32768
ROUNDS = 2
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def turn(model, ids):
    model.zero_grad(set_to_none=True)
    ctypes.CDLL(None).malloc_trim(0)  # what the turn before freed
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM: from here on
    before, start = status("VmRSS"), time.process_time()
    loss = model(ids, labels=ids).loss
    loss.backward()
    seconds = time.process_time() - start
    return {"bytes": status("VmHWM") - before, "seconds": seconds, "loss": loss.item()}


def measured():
    """{way: medians of its turns}, and how far the gradients are apart, relative to their size."""
    torch.manual_seed(0)
    models = {way: Qwen3ForCausalLM(Qwen3Config(vocab_size=V, **SIZES)).train() for way in ("stock", "patched")}
    models["patched"].load_state_dict(models["stock"].state_dict())
    apply_prism_kernels(models["patched"])
    ids = torch.randint(V, (N // L, L))
    found = {way: [] for way in models}
    for _ in range(ROUNDS):
        for way, model in models.items():
            found[way].append(turn(model, ids))
    pairs = zip(*(model.parameters() for model in models.values()))
    apart = max(float((a.grad - b.grad).norm() / a.grad.norm()) for a, b in pairs)
    medians = {
        way: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for way, rows in found.items()
    }
    return {**medians, "gradients": apart}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measured()))
