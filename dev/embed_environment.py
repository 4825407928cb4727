"""Builds an environment in which prism_kernels runs inside another trainer on a CPU: what ``make test-embed`` runs in.

    python -m dev.embed_environment HOST FOLDER      makes a virtual environment there: some 3 minutes, 2 GB

Versions are pinned: the integrations replace names that are not public, and ``TESTED`` in each of them names these.
torchvision's pin of torch is left out, and `torchvision_schemas.py` stands beside it, as in `vllm_environment.py`.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from dev.vllm_environment import ROOT, SHIM, TESTS, TORCH, TORCHVISION, own_needs

# By host: what pip resolves beside our own needs, and the modules that must import afterwards.
HOSTS = {
    "trl": (["trl==1.16.0", "transformers==5.24.0", "peft==0.20.0"], ["trl", "torchvision.transforms.v2.functional"]),
    # Of what verl requires, that which its imports need: wandb, tensorboard, pylatexenc and the like are left out.
    "verl": (
        ["transformers==5.10.2", "ray==2.60.0", "tensordict==0.10.0", "TransferQueue==0.1.11", "hydra-core==1.3.8",
         "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0", "torchdata==0.11.0", "codetiming==1.4.0", "orjson",
         "cachetools", "uvicorn", "fastapi", "aiohttp", "pillow"],
        ["verl.trainer.ppo.v1"],
    ),
}  # fmt: skip
# Hosts whose transformers prism_fast cannot take, where prism_kernels runs alone: what is installed without its needs.
ALONE = {"verl": ["verl==0.9.1"]}


def build(host: str, folder: Path) -> None:
    packages, modules = HOSTS[host]
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", *arguments], check=True)

    pip("install", "--quiet", "--upgrade", "pip")
    pip("install", "--quiet", TORCH)
    pip("install", "--quiet", TORCH, *packages, *(["numpy"] if host in ALONE else own_needs()), *TESTS)
    pip("install", "--quiet", "--no-deps", TORCHVISION, *ALONE.get(host, ()))
    pip("install", "--quiet", "--no-deps", "-e", str(ROOT))
    site = next(folder.glob("lib/python*/site-packages"))
    (site / f"{SHIM}.py").write_text((ROOT / "dev" / f"{SHIM}.py").read_text())
    (site / f"{SHIM}.pth").write_text(f"import {SHIM}\n")
    ours = "prism_kernels" if host in ALONE else "prism_fast"
    subprocess.run([python, "-c", f"import {', '.join(modules)}, {ours}"], check=True, cwd=folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in HOSTS:
        sys.exit(f"python -m dev.embed_environment HOST FOLDER, with HOST one of {', '.join(HOSTS)}")
    build(sys.argv[1], Path(sys.argv[2]))
