"""The Triton kernels of rms_norm and swiglu without a GPU: logic in the interpreter, binaries by the compile gate.

Both need processes of their own: the interpreter is chosen when triton is imported, and compiles nothing.
"""

import numpy
import pytest
import torch

from tests.kernels.linear_logprob.linear_cases import skip_interpreted
from tests.kernels.linear_logprob.test_triton import run, version

triton = pytest.importorskip("triton")
pytestmark = skip_interpreted


@pytest.mark.numerical
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same tests")
@pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4),
    reason="triton 3.6's interpreter takes int() of an array of one element, which numpy 2.4 refuses",
)
def test_interpreter():
    files = ["tests/kernels/rms_norm/test_rms_norm.py", "tests/kernels/swiglu/test_swiglu.py"]
    code, output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert code == 0, output
    assert " passed" in output, output


def test_compile_gate():
    command = ["-m", "prism_kernels.compile_gate", "--op", "rms_norm,swiglu", "--sample", "8", "--jobs", "1"]
    code, output = run(*command, TRITON_INTERPRET="0")
    assert code == 0, output
    assert ", 0 failed" in output, output
