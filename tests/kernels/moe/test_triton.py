"""The Triton kernels of moe and group_advantage without a GPU: logic in the interpreter, binaries by the compile gate.

Both need processes of their own: the interpreter is chosen when triton is imported, and compiles nothing.
"""

import numpy
import pytest

from tests.kernels.linear_logprob.linear_cases import skip_interpreted
from tests.kernels.linear_logprob.test_triton import run, version

triton = pytest.importorskip("triton")
pytestmark = skip_interpreted


@pytest.mark.numerical
@pytest.mark.slow
@pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4),
    reason="triton 3.6's interpreter takes int() of an array of one element, which numpy 2.4 refuses",
)
def test_interpreter():
    files = [
        "tests/kernels/group_advantage/test_group_advantage.py",
        "tests/kernels/moe/test_moe.py",
        "tests/kernels/moe/test_grouped_gemm.py",
    ]
    code, output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert code == 0, output
    assert " passed" in output, output


def test_compile_gate():
    command = ["-m", "prism_kernels.compile_gate", "--op", "group_advantage,moe", "--sample", "8", "--jobs", "1"]
    code, output = run(*command, TRITON_INTERPRET="0")
    assert code == 0, output
    assert ", 0 failed" in output, output
