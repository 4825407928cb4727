"""The Triton kernels that merge a library's calls, without a GPU: in the interpreter, and by the compile gate."""

import pytest

from tests.kernels.linear_logprob.linear_cases import skip_interpreted
from tests.kernels.linear_logprob.test_triton import run

pytest.importorskip("triton")
pytestmark = skip_interpreted


@pytest.mark.numerical
@pytest.mark.slow
def test_interpreter():
    files = [f"tests/kernels/tree_attention/{name}.py" for name in ("test_triton_merge", "test_flash")]
    code, output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert code == 0, output
    assert " passed" in output, output


def test_compile_gate():
    command = ["-m", "prism_kernels.compile_gate", "--op", "tree_attention", "--sample", "4", "--jobs", "1"]
    code, output = run(*command, TRITON_INTERPRET="0")
    assert code == 0, output
    assert ", 0 failed" in output, output
