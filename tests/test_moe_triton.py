"""The Triton kernels of moe and group_advantage without a GPU: logic in the interpreter, binaries by the compile gate.

Both need processes of their own: the interpreter is chosen when triton is imported, and compiles nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.linear_cases import skip_interpreted

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
pytestmark = skip_interpreted


def run(*command, **environment):
    environment = {**os.environ, **environment}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout[-6000:] + result.stderr[-2000:]


def test_interpreter():
    files = ["tests/test_group_advantage.py", "tests/test_moe.py"]
    code, output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert code == 0, output
    assert " passed" in output, output


def test_compile_gate():
    command = ["-m", "prism_kernels.compile_gate", "--op", "group_advantage,moe", "--sample", "8", "--jobs", "1"]
    code, output = run(*command, TRITON_INTERPRET="0")
    assert code == 0, output
    assert ", 0 failed" in output, output
