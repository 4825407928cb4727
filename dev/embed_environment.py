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
    # msgspec it imports without naming it, qwen-vl-utils it asks for when it opens a Qwen3-VL.
    "swift": (
        ["ms-swift==4.6.0", "transformers==5.19.0", "trl==0.29.1", "peft==0.20.0", "msgspec", "qwen-vl-utils==0.0.14"],
        ["swift.rlhf_trainers.grpo_trainer", "torchvision.transforms.v2.functional"],
    ),
}


def build(host: str, folder: Path) -> None:
    packages, modules = HOSTS[host]
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", *arguments], check=True)

    pip("install", "--quiet", "--upgrade", "pip")
    pip("install", "--quiet", TORCH)
    pip("install", "--quiet", TORCH, *packages, *own_needs(), *TESTS)
    pip("install", "--quiet", "--no-deps", TORCHVISION)
    pip("install", "--quiet", "--no-deps", "-e", str(ROOT))
    site = next(folder.glob("lib/python*/site-packages"))
    (site / f"{SHIM}.py").write_text((ROOT / "dev" / f"{SHIM}.py").read_text())
    (site / f"{SHIM}.pth").write_text(f"import {SHIM}\n")
    subprocess.run([python, "-c", f"import {', '.join(modules)}, prism_fast"], check=True, cwd=folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in HOSTS:
        sys.exit(f"python -m dev.embed_environment HOST FOLDER, with HOST one of {', '.join(HOSTS)}")
    build(sys.argv[1], Path(sys.argv[2]))
