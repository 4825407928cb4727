"""Builds an environment in which prism_kernels runs inside another trainer on a CPU: what ``make test-embed`` runs in.

    python -m dev.embed_environment HOST FOLDER      makes a virtual environment there: some 3 minutes, 2 GB

Versions are pinned: the integrations replace names that are not public, and ``TESTED`` in each of them names these.
torchvision's pin of torch is left out, and `torchvision_schemas.py` stands beside it, as in `vllm_environment.py`.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dev.vllm_environment import ROOT, SHIM, TESTS, TORCH, TORCHVISION, own_needs


@dataclass(frozen=True)
class Host:
    """``packages``: what pip resolves. ``modules``: what must import afterwards. ``alone``: installed without what they
    ask for. ``trainer``: whether prism_fast is to run there too, or prism_kernels alone."""

    packages: Sequence[str]
    modules: Sequence[str]
    alone: Sequence[str] = ()
    trainer: bool = True


HOSTS = {
    "trl": Host(
        ["trl==1.16.0", "transformers==5.24.0", "peft==0.20.0"], ["trl", "torchvision.transforms.v2.functional"]
    ),
    # Of what verl requires, that which its imports need here: wandb, tensorboard, pylatexenc and the like are left out.
    "verl": Host(
        [
            "transformers==5.10.2", "ray==2.60.0", "tensordict==0.10.0", "TransferQueue==0.1.11", "hydra-core==1.3.2",
            "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0", "torchdata", "codetiming", "orjson", "cachetools",
            "uvicorn", "fastapi", "aiohttp", "pillow",
        ],
        ["verl.trainer.ppo.v1"],
        alone=["verl==0.9.1"],
        trainer=False,
    ),
}  # fmt: skip


def build(host: str, folder: Path) -> None:
    wanted = HOSTS[host]
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", *arguments], check=True)

    pip("install", "--quiet", "--upgrade", "pip")
    pip("install", "--quiet", TORCH)
    pip("install", "--quiet", TORCH, *wanted.packages, *(own_needs() if wanted.trainer else ["numpy"]), *TESTS)
    pip("install", "--quiet", "--no-deps", TORCHVISION, *wanted.alone)
    pip("install", "--quiet", "--no-deps", "-e", str(ROOT))
    site = next(folder.glob("lib/python*/site-packages"))
    (site / f"{SHIM}.py").write_text((ROOT / "dev" / f"{SHIM}.py").read_text())
    (site / f"{SHIM}.pth").write_text(f"import {SHIM}\n")
    modules = [*wanted.modules, "prism_fast" if wanted.trainer else "prism_kernels"]
    subprocess.run([python, "-c", f"import {', '.join(modules)}"], check=True, cwd=folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in HOSTS:
        sys.exit(f"python -m dev.embed_environment HOST FOLDER, with HOST one of {', '.join(HOSTS)}")
    build(sys.argv[1], Path(sys.argv[2]))
