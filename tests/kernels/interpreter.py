"""Triton kernels without a GPU: their logic in the interpreter, their binaries by the compile gate.

Both need processes of their own: the interpreter is chosen when triton is imported, and compiles nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def _version(text):
    return tuple(int(part) for part in text.split(".")[:2])


needs_interpreter = pytest.mark.skipif(
    _version(triton.__version__) < (3, 7) and _version(numpy.__version__) >= (2, 4),
    reason="triton 3.6's interpreter takes int() of an array of one element, which numpy 2.4 refuses",
)


def run(*command, **environment):
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return result.returncode, result.stdout[-6000:] + result.stderr[-2000:]


def assert_passes_interpreted(*files, only=""):
    """``only``: pytest's -k."""
    code, output = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *(["-k", only] if only else []), TRITON_INTERPRET="1"
    )
    assert code == 0, output
    assert " passed" in output, output


def assert_passes_the_gate(ops, sample, said=", 0 failed"):
    """A sample of the configurations of some ops; ``said``: what its last line holds."""
    command = ["-m", "prism_kernels.compile_gate", "--op", ops, "--sample", str(sample), "--jobs", "1"]
    code, output = run(*command, TRITON_INTERPRET="0")
    assert code == 0, output
    assert said in output, output
