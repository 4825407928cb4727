"""The C++ under libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer, each part against what defines it.

    python -m dev.fuzz_native [--minutes 10] [--seed 0] [--only packing] [--compiler clang++-14]

dev/native/NAME.cpp feeds csrc/NAME.cpp, without Python in the process, with whatever bytes the fuzzer finds, and holds
the results against plain loops (spans, decode, elementwise), or against what must be so of them (packing, balance,
sampling, adamw). Where there is no clang with libFuzzer (Debian: clang, libclang-rt-14-dev), g++ and
dev/native/driver.cpp take its place, which change inputs by seed without looking at coverage; which was used is said.
A fault ends the script, with the input and the command that shows it again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES, HARNESSES = ROOT / "csrc", ROOT / "dev" / "native"
BUILT = ROOT / "build" / "fuzz"
NAMES = sorted(path.stem for path in HARNESSES.glob("*.cpp") if path.stem != "driver")
OPTIONS = [
    "-std=c++17",
    f"-I{SOURCES}",
    "-O1",
    "-g",
    "-ffp-contract=off",
    "-Wno-psabi",
    "-pthread",
]  # contraction: as setup.py says
SANITIZERS = "address,undefined"
MOST_BYTES = 1500  # of an input


class Compiler(NamedTuple):
    command: str
    guided: bool  # by coverage: libFuzzer

    def describe(self) -> str:
        version = subprocess.run([self.command, "--version"], capture_output=True, text=True, check=True).stdout
        way = "libFuzzer" if self.guided else "dev/native/driver.cpp, no guidance by coverage"
        return f"{version.splitlines()[0]}: {way}, -fsanitize={SANITIZERS}"


def compiler(asked: str | None) -> Compiler:
    """clang++ that links libFuzzer, or else g++."""
    names = [asked] if asked else ["clang++", *(f"clang++-{version}" for version in range(21, 10, -1)), "g++"]
    for name in filter(shutil.which, names):
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder) / "trial.cpp"
            trial.write_text('extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }')
            command = [name, f"-fsanitize=fuzzer,{SANITIZERS}", str(trial), "-o", f"{folder}/trial"]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return Compiler(name, True)
        if "clang" not in name:
            return Compiler(name, False)
    raise SystemExit(f"none of {', '.join(names)} compiles: install clang and its runtime, or g++")


def build(name: str, by: Compiler) -> Path:
    BUILT.mkdir(parents=True, exist_ok=True)
    sanitizers = f"fuzzer,{SANITIZERS}" if by.guided else SANITIZERS
    sources = [HARNESSES / f"{name}.cpp", SOURCES / f"{name}.cpp"]
    sources += [] if by.guided else [HARNESSES / "driver.cpp"]
    target = BUILT / name
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    subprocess.run([by.command, *OPTIONS, *flags, *map(str, sources), "-o", str(target)], check=True)
    return target


def fuzz(name: str, by: Compiler, seconds: int, seed: int) -> str | None:
    """What there is to say of a run; None after a fault, which is printed."""
    program, folder = build(name, by), BUILT / f"{name}-inputs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [str(program), str(seconds), str(seed)]
    if by.guided:
        options = {
            "max_total_time": seconds,
            "seed": seed + 1,
            "max_len": MOST_BYTES,
            "timeout": 20,
            "rss_limit_mb": 2048,
        }
        command = [str(program), *(f"-{key}={value}" for key, value in options.items()), str(folder)]
    done = subprocess.run(command, cwd=BUILT, capture_output=True, text=True, errors="replace", check=False)
    told = done.stdout + done.stderr
    if done.returncode:
        print(told[-6000:])
        found = re.search(r"written to (\S+)", told)
        again = [str(program), str(BUILT / (found[1] if found else "crash-input"))]
        again = again if by.guided else [again[0], "0", "0", again[1]]
        print(f"fault: {name}: exit status {done.returncode}; again: {' '.join(again)}")
        return None
    runs = int((re.search(r"Done (\d+) runs", told) or re.search(r"(\d+) runs", told) or [0, 0])[1])
    covered = re.findall(r"cov: (\d+)", told)
    seen = f", {int(covered[-1]):,} edges covered, {len(os.listdir(folder)):,} inputs kept" if covered else ""
    return f"{name}: {runs:,} inputs in {seconds} s{seen}; no fault"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together, their building left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=NAMES, action="append")
    parser.add_argument("--compiler")
    asked = parser.parse_args()
    by, names, faults = compiler(asked.compiler), asked.only or NAMES, 0
    print(by.describe(), flush=True)
    for name in names:
        line = fuzz(name, by, max(1, round(60 * asked.minutes / len(names))), asked.seed)
        faults += line is None
        if line:
            print(line, flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
