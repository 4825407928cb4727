"""What a machine without a network lacks, as wheels: fetched where there is one, installed where there is none.

    python -m benchmarks.gpu.wheels .whl             # fetches them: some 10 MB, for Python 3.12 on x86-64
    make gpu PART=first                              # installs from .whl what is missing into runs/gpu/site

The machine has torch, triton and transformers with what they need. Nothing of it is changed: what is missing goes into
a folder of its own, which the parts of ``make gpu`` find first.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_BYTES = 60_000_000
NOT_NEEDED = ("datasets",)  # absent, and left so
# pip matches these literally, and wheels are tagged with several of them.
PLATFORMS = [f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_17", "2014", "1")]
TARGET = ["--python-version", "3.12", "--implementation", "cp", *(w for p in PLATFORMS for w in ("--platform", p))]
SECONDS = 300  # of one pip


@dataclass(frozen=True)
class Wheel:
    """``module``: what it is imported as. ``source``: it is published as source alone, of plain Python. ``absent``: the
    machine has never had it; others it may have."""

    name: str
    version: str
    module: str
    absent: bool = True
    source: bool = False

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"

    def file(self, folder: Path) -> Path | None:
        """Its wheel, of any version tag."""
        start = f"{re.sub(r'[-_.]+', '_', self.name)}-{self.version}-".lower()
        return next((path for path in sorted(folder.glob("*.whl")) if path.name.lower().startswith(start)), None)


WHEELS = (
    # The trainer: settings and the judge of answers.
    Wheel("pydantic", "2.14.4", "pydantic"),
    Wheel("pydantic-core", "2.50.5", "pydantic_core"),
    Wheel("typing-inspection", "0.4.5", "typing_inspection"),
    Wheel("annotated-types", "0.8.0", "annotated_types"),
    Wheel("math-verify", "0.9.0", "math_verify"),
    Wheel("latex2sympy2_extended", "1.11.0", "latex2sympy2_extended"),
    Wheel("antlr4-python3-runtime", "4.13.2", "antlr4"),
    Wheel("typer", "0.29.2", "typer", absent=False),
    Wheel("shellingham", "1.5.4", "shellingham", absent=False),
    Wheel("annotated-doc", "0.0.7", "annotated_doc", absent=False),
    # The build and the tests.
    Wheel("pybind11", "3.1.0", "pybind11", absent=False),
    Wheel("pytest-timeout", "2.4.0", "pytest_timeout", absent=False),
    Wheel("pytest-xdist", "3.8.0", "xdist", absent=False),
    Wheel("execnet", "2.1.2", "execnet", absent=False),
    Wheel("hypothesis", "6.170.17", "hypothesis", absent=False),
    Wheel("sortedcontainers", "2.4.0", "sortedcontainers", absent=False),
    # DeepSpeed, for train-4b.
    Wheel("deepspeed", "0.19.8", "deepspeed", source=True),
    Wheel("hjson", "3.1.0", "hjson"),
    Wheel("einops", "0.8.2", "einops", absent=False),
    Wheel("msgpack", "1.2.4", "msgpack", absent=False),
    Wheel("py-cpuinfo", "9.0.0", "cpuinfo", absent=False),
    Wheel("ninja", "1.13.2", "ninja", absent=False),
    # Peers; of verl and trl a file each is loaded, without what else they need.
    Wheel("liger-kernel", "0.8.5", "liger_kernel"),
    Wheel("cut-cross-entropy", "25.1.1", "cut_cross_entropy"),
    Wheel("trl", "1.16.0", "trl"),
    Wheel("verl", "0.9.1", "verl"),
)


def is_there(wheel: Wheel) -> bool:
    """In any version: what the machine has is used."""
    try:
        importlib.metadata.version(wheel.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def missing() -> list[Wheel]:
    return [wheel for wheel in WHEELS if not is_there(wheel)]


def blocked() -> list[str]:
    """Modules that a dry run finds in the folder of installed wheels or not at all."""
    return [*NOT_NEEDED, *(wheel.module for wheel in WHEELS if wheel.absent)]


def fetch_command(wheel: Wheel, folder: Path) -> list[str]:
    pip = [sys.executable, "-m", "pip"]
    if wheel.source:
        return [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), wheel.pin]
    return [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", *TARGET, "-d", str(folder), wheel.pin]


def fetch(folder: Path) -> list[str]:
    """Downloads what is not in the folder yet; returns what could not be had, and why."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for wheel in WHEELS:
        if wheel.file(folder) is None:
            done = _run(fetch_command(wheel, folder))
            if done or wheel.file(folder) is None:
                failed.append(f"{wheel.pin}: {done or 'pip left no wheel of this version'}")
    known = {wheel.file(folder) for wheel in WHEELS}
    failed += [f"{path.name}: not in the list; remove it" for path in folder.glob("*.whl") if path not in known]
    total = sum(path.stat().st_size for path in folder.glob("*.whl"))
    if total > LIMIT_BYTES:
        failed.append(f"{folder}: {total / 1e6:.0f} MB, expected at most {LIMIT_BYTES / 1e6:.0f} MB")
    return failed


def install(folder: Path, site: Path, needed: Sequence[Wheel] | None = None) -> list[str]:
    """Installs ``needed`` (default: what is missing) from the folder into ``site``, and says what it did, in lines."""
    needed = missing() if needed is None else needed
    files = {wheel: wheel.file(folder) for wheel in needed}
    lines = []
    there = [str(path) for path in files.values() if path is not None]
    if there:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        fault = _run([*pip, "--no-cache-dir", "--target", str(site), *there])
        names = ", ".join(wheel.name for wheel, path in files.items() if path is not None)
        lines.append(f"wheels: {fault or f'installed into {site}: {names}'}")
    absent = [wheel.name for wheel, path in files.items() if path is None]
    if absent:
        how = f"fetch them where there is a network: python -m benchmarks.gpu.wheels {folder}"
        lines.append(f"wheels: not installed, and not in {folder}: {', '.join(absent)}; {how}")
    return lines


def _run(command: list[str]) -> str:
    """ "", or why it failed, in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"pip took over {SECONDS} s"
    return (
        "" if done.returncode == 0 else " ".join((done.stderr.strip().splitlines() or ["pip failed"])[-1].split())[:200]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where the wheels go")
    parser.add_argument("--list", action="store_true", help="the list alone")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(wheel.pin for wheel in WHEELS))
        return 0
    if given.folder is None:
        parser.error("name the folder for the wheels, .whl say")
    failed = fetch(given.folder)
    for line in failed:
        print(f"wheels: {line}", file=sys.stderr)
    files = list(given.folder.glob("*.whl"))
    print(f"{given.folder}: {len(files)} wheels, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
