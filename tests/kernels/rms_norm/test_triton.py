"""The Triton kernels of rms_norm and swiglu without a GPU: logic in the interpreter, binaries by the compile gate.

Both need processes of their own: the interpreter is chosen when triton is imported, and compiles nothing.
"""

import pytest
import torch

from tests.kernels.interpreter import assert_passes_interpreted, assert_passes_the_gate, needs_interpreter
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

pytestmark = skip_interpreted


@pytest.mark.numerical
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same tests")
@needs_interpreter
def test_interpreter():
    files = ["tests/kernels/rms_norm/test_rms_norm.py", "tests/kernels/swiglu/test_swiglu.py"]
    assert_passes_interpreted(*files)


def test_compile_gate():
    assert_passes_the_gate("rms_norm,swiglu", 8)
