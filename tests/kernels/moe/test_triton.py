"""The Triton kernels of moe and group_advantage without a GPU: logic in the interpreter, binaries by the compile gate.

Both need processes of their own: the interpreter is chosen when triton is imported, and compiles nothing.
"""

import pytest

from tests.kernels.interpreter import assert_passes_interpreted, assert_passes_the_gate, needs_interpreter
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

pytestmark = skip_interpreted


@pytest.mark.numerical
@pytest.mark.slow
@needs_interpreter
def test_interpreter():
    files = [
        "tests/kernels/group_advantage/test_group_advantage.py",
        "tests/kernels/moe/test_moe.py",
        "tests/kernels/moe/test_grouped_gemm.py",
        "tests/kernels/moe/test_launches.py",
    ]
    assert_passes_interpreted(*files)


def test_compile_gate():
    assert_passes_the_gate("group_advantage,moe", 8)
