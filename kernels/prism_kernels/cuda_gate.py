"""Compile the CUDA sources of csrc/ by nvcc for GPUs that need not be here, and read registers and spills off ptxas.

A part of the compile gate (compile_gate.py), which adds its reports to those of the Triton kernels. Needs nvcc and the
sources, which an installed wheel does not hold.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-O3", "-std=c++17", "-DPRISM_WITH_CUDA=1")  # setup.py builds with the same


class Compiled(NamedTuple):
    """One kernel of a source, as one target's ptxas made it."""

    name: str
    registers: int
    local_bytes: int  # stack and spills of a thread
    shared_bytes: int


def need_nvcc() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not sources():
        return f"{CSRC} holds no .cu file: run in the repository"
    return None if shutil.which("nvcc") else "nvcc is not on PATH: install the CUDA toolkit"


def sources() -> list[Path]:
    return sorted(CSRC.glob("*.cu"))


def compile_source(source: Path, target: int) -> list[Compiled]:
    """The kernels of a source, compiled for sm_TARGET. Raises RuntimeError where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.cubin")
        command = ["nvcc", *FLAGS, "-cubin", f"-arch=sm_{target}", "-Xptxas", "-v", str(source), "-o", out]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} for sm_{target}: {' '.join(done.stderr.split())[-300:]}")
    return read_ptxas(done.stderr)


def read_ptxas(text: str) -> list[Compiled]:
    """The kernels of what ``ptxas -v`` writes.

    >>> read_ptxas("Compiling entry function '_Z1k' for 'sm_90'\\n 8 bytes stack frame, 0 bytes spill stores, "
    ...            "0 bytes spill loads\\n Used 40 registers, 16 bytes smem")
    [Compiled(name='_Z1k', registers=40, local_bytes=8, shared_bytes=16)]
    """
    found = []
    for part in text.split("Compiling entry function '")[1:]:
        local = [_number(rf"(\d+) bytes {what}", part) for what in ("stack frame", "spill stores", "spill loads")]
        registers, shared = _number(r"Used (\d+) registers", part), _number(r"(\d+) bytes smem", part)
        found.append(Compiled(_plain(part.partition("'")[0]), registers, max(local), shared))
    return found


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


_TYPES = {"f": "fp32", "t": "bf16", "Lb0E": "0", "Lb1E": "1"}  # csrc holds a bf16 as the 16 bits that it is


def _plain(mangled: str) -> str:
    """``adamw_step_kernel<1, fp32, bf16>``: a mangled name says how long each of its parts is."""
    end = mangled.find("_kernel") + len("_kernel")
    begins = [m.end() for m in re.finditer(r"\d+", mangled[:end]) if m.end() + int(m[0]) == end]
    if not begins:
        return mangled
    arguments = re.match(r"I((?:Lb[01]E|[a-z])+)E", mangled[end:])
    kinds = re.finditer(r"Lb[01]E|[a-z]", arguments[1]) if arguments else ()
    names = [_TYPES.get(kind[0], kind[0]) for kind in kinds]
    return mangled[begins[-1] : end] + (f"<{', '.join(names)}>" if names else "")
