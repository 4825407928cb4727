"""The steps that environments of `make test-vllm`, `make test-embed` and `make test-eval` are built by, on a CPU.

torch and torchvision are pinned: a range would let pip take a CUDA build of several gigabytes. PyPI's torchvision wants
a torch with CUDA, so `torchvision_schemas.py` is put beside it.
"""

from __future__ import annotations

import re
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
TESTS = ("pytest", "pytest-timeout", "hypothesis")
SHIM = "torchvision_schemas"
OURS_APART = {"torch", "triton"}  # of what the trainer requires: pinned above, and of no use on a CPU


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def extra(name: str) -> list[str]:
    """What an extra of pyproject.toml requires."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][name]


def own_needs() -> list[str]:
    """What the trainer requires, less `OURS_APART`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *extra("train")]
    return [line for line in lines if name_of(line) not in OURS_APART]


def build(
    folder: Path,
    packages: Sequence[str],
    *,
    modules: Sequence[str],
    apart: Sequence[str] = (),
    trainer: bool = True,
) -> None:
    """A virtual environment in ``folder`` that holds the trainer (as this clone has it), pytest and ``packages``.

    ``apart``: installed after them, without what they require. ``modules`` must import in it at the end. Where the
    ``trainer`` cannot stand beside them, its needs are left out, and prism_kernels must import.
    """
    folder = folder.absolute()
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", *arguments], check=True)

    pip("install", "--quiet", "--upgrade", "pip")
    pip("install", "--quiet", TORCH)
    pip("install", "--quiet", TORCH, *packages, *(own_needs() if trainer else ()), *TESTS)
    pip("install", "--quiet", "--no-deps", *apart, TORCHVISION)
    pip("install", "--quiet", "--no-deps", "-e", str(ROOT))
    site = next(folder.glob("lib/python*/site-packages"))
    (site / f"{SHIM}.py").write_text((ROOT / "dev" / f"{SHIM}.py").read_text())
    (site / f"{SHIM}.pth").write_text(f"import {SHIM}\n")
    subprocess.run(
        [python, "-c", f"import {', '.join(modules)}, {'prism_fast' if trainer else 'prism_kernels'}"],
        check=True,
        cwd=folder,
    )
