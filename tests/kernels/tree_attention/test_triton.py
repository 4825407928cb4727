"""The Triton kernels that merge a library's calls, without a GPU: in the interpreter, and by the compile gate."""

import pytest

from tests.kernels.interpreter import assert_passes_interpreted, assert_passes_the_gate
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

pytestmark = skip_interpreted


@pytest.mark.numerical
@pytest.mark.slow
def test_interpreter():
    files = [f"tests/kernels/tree_attention/{name}.py" for name in ("test_triton_merge", "test_flash")]
    assert_passes_interpreted(*files)


def test_compile_gate():
    assert_passes_the_gate("tree_attention", 4)
