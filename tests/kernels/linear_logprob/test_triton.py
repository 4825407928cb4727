"""The Triton kernels of the LM head without a GPU: their logic in the interpreter, their binaries by the compile gate.

Both need processes of their own: the interpreter is chosen when triton is imported, and compiles nothing.
"""

import pytest
import torch

from prism_kernels.linear_logprob import plan
from tests.kernels.interpreter import assert_passes_interpreted, assert_passes_the_gate, needs_interpreter
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

# All that launches the row kernels in a way of its own; the objectives' arithmetic is the same on every device.
LAUNCHES = (
    "(test_linear_logprob and not (cross_entropy and True)) or everything or (over_chunks and 7) or dtypes or unseen "
    "or fp16 or softcap or peaked or test_also or test_triton_objective"
)


@pytest.mark.numerical
@pytest.mark.slow
@skip_interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same tests")
@needs_interpreter
def test_interpreter():
    files = [
        "tests/kernels/linear_logprob/test_linear_logprob.py",
        "tests/kernels/linear_logprob/test_linear_policy_loss.py",
        "tests/kernels/linear_logprob/test_also.py",
        "tests/kernels/linear_logprob/test_triton_objective.py",
    ]
    assert_passes_interpreted(*files, only=LAUNCHES)


@skip_interpreted
def test_compile_gate():
    assert_passes_the_gate("linear_logprob", 8, said="8 compiled, 0 failed")


@skip_interpreted
def test_chunks_fill_waves():
    """By arithmetic for 128 x 256 tiles on 132 processors: 66 x 10 tiles are 5 waves, 32 x 10 are 2.4 that cost 3."""
    for limit, best in ((8448, 8448), (6700, 6656), (5100, 4992), (4096, 3328)):
        chunks = plan.chunks_of_rows(1 << 20, limit, 2560, 132)
        assert chunks[0] == (0, best) or limit == 4096
        assert max(stop - start for start, stop in chunks) <= limit
    assert plan.chunks_of_rows(8192, 8192, 2560, 132) == ((0, 8192),)


@skip_interpreted
@pytest.mark.parametrize("processors", [0, 132])
def test_chunks_cover_every_row_once(processors):
    for rows in (0, 1, 127, 128, 1003, 9000):
        for limit in (1, 100, 128, 640, 10_000):
            chunks = plan.chunks_of_rows(rows, limit, 512, processors)
            assert [row for start, stop in chunks for row in range(start, stop)] == list(range(rows))
            assert all(stop - start <= limit for start, stop in chunks)


@skip_interpreted
def test_chunks_of_whole_sequences():
    assert plan.chunks_of_sequences([3, 3, 5, 9, 12], 5) == [(0, 5), (5, 9), (9, 12)]
    assert plan.chunks_of_sequences([3, 9], 5) is None
    assert plan.chunks_of_sequences([], 5) == []
