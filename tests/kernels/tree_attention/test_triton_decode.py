"""The Triton kernels of decoding without a GPU, as tests/kernels/moe/test_triton.py has them."""

import pytest

from tests.kernels.interpreter import assert_passes_interpreted, assert_passes_the_gate, needs_interpreter
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

pytestmark = skip_interpreted

# Tiles with and without room, idle rows, several pages and cuts, heads that fill no tile; fp16, fp32, fp64.
WAYS = "(every_row and not changes1 and not changes3) or (exact and 20) or fp16 or written or (norms and not changes3)"


@pytest.mark.numerical
@pytest.mark.slow
@needs_interpreter
def test_interpreter():
    file = "tests/kernels/tree_attention/test_decode.py"
    assert_passes_interpreted(file, only=WAYS)


def test_compile_gate():
    assert_passes_the_gate("tree_attention", 3)
