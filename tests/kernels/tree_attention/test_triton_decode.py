"""The Triton kernels of decoding without a GPU, as tests/kernels/moe/test_triton.py has them."""

import numpy
import pytest

from tests.kernels.linear_logprob.linear_cases import skip_interpreted
from tests.kernels.linear_logprob.test_triton import run, version

triton = pytest.importorskip("triton")
pytestmark = skip_interpreted

# Tiles with and without room, idle rows, several pages and cuts, heads that fill no tile; fp16, fp32, fp64.
WAYS = "(every_row and not changes1 and not changes3) or (exact and 20) or fp16 or written"


@pytest.mark.numerical
@pytest.mark.slow
@pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4),
    reason="triton 3.6's interpreter takes int() of an array of one element, which numpy 2.4 refuses",
)
def test_interpreter():
    file = "tests/kernels/tree_attention/test_decode.py"
    code, output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", WAYS, file, TRITON_INTERPRET="1")
    assert code == 0, output
    assert " passed" in output, output


def test_compile_gate():
    command = ["-m", "prism_kernels.compile_gate", "--op", "tree_attention", "--sample", "3", "--jobs", "1"]
    code, output = run(*command, TRITON_INTERPRET="0")
    assert code == 0, output
    assert ", 0 failed" in output, output
