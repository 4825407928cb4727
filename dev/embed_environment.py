"""Builds an environment in which prism_kernels runs inside another trainer on a CPU: what ``make test-embed`` runs in.

    python -m dev.embed_environment HOST FOLDER      makes a virtual environment there: some 3 minutes, 2 GB

Versions are pinned: the integrations replace names that are not public, and ``TESTED`` in each of them names these.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dev.environments import build

# By host: what pip resolves beside our own needs, and the modules that must import afterwards.
HOSTS = {
    # The last two are what OpenRLHF's executor imports; the rest of what it requires is left out.
    "trl": (
        ["trl==1.16.0", "transformers==5.24.0", "peft==0.20.0", "aiohttp==3.14.5", "pylatexenc==2.10"],
        ["trl", "torchvision.transforms.v2.functional", "openrlhf.utils.agent"],
    ),
    # Of what verl requires, that which its imports need: wandb, tensorboard, pylatexenc and the like are left out.
    "verl": (
        ["transformers==5.10.2", "ray==2.60.0", "tensordict==0.10.0", "TransferQueue==0.1.11", "hydra-core==1.3.8",
         "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0", "torchdata==0.11.0", "codetiming==1.4.0", "orjson",
         "cachetools", "uvicorn", "fastapi", "aiohttp", "pillow"],
        ["verl.trainer.ppo.v1"],
    ),
    # msgspec it imports without naming it, qwen-vl-utils it asks for when it opens a Qwen3-VL.
    "swift": (
        ["ms-swift==4.6.0", "transformers==5.19.0", "trl==0.29.1", "peft==0.20.0", "msgspec", "qwen-vl-utils==0.0.14"],
        ["swift.rlhf_trainers.grpo_trainer", "torchvision.transforms.v2.functional"],
    ),
}  # fmt: skip
# What is installed without its needs, which exclude ours.
APART = {"verl": ["verl==0.9.1"], "trl": ["openrlhf==0.11.2"]}
ALONE = ("verl",)  # hosts whose transformers prism_fast cannot take, where prism_kernels runs alone


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in HOSTS:
        sys.exit(f"python -m dev.embed_environment HOST FOLDER, with HOST one of {', '.join(HOSTS)}")
    host = sys.argv[1]
    packages, modules = HOSTS[host]
    build(Path(sys.argv[2]), packages, modules=modules, apart=APART.get(host, ()), trainer=host not in ALONE)
