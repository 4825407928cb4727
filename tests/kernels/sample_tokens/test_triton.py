"""The Triton kernels of sample_tokens without a GPU, as tests/kernels/moe/test_triton.py has them."""

import numpy
import pytest

from tests.kernels.linear_logprob.linear_cases import skip_interpreted
from tests.kernels.linear_logprob.test_triton import run, version

triton = pytest.importorskip("triton")
pytestmark = skip_interpreted

# The kernel's ways: types and cuts, noise and none, forbidden words, what is no number.
WAYS = "(definitions and 1003) or no_number or beside or minus_infinity"


@pytest.mark.numerical
@pytest.mark.slow
@pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4),
    reason="triton 3.6's interpreter takes int() of an array of one element, which numpy 2.4 refuses",
)
def test_interpreter():
    file = "tests/kernels/sample_tokens/test_sample_tokens.py"
    code, output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", WAYS, file, TRITON_INTERPRET="1")
    assert code == 0, output
    assert " passed" in output, output


def test_compile_gate():
    command = ["-m", "prism_kernels.compile_gate", "--op", "sample_tokens", "--sample", "3", "--jobs", "1"]
    code, output = run(*command, TRITON_INTERPRET="0")
    assert code == 0, output
    assert ", 0 failed" in output, output


# The PTX of the kernel as it is launched: with a fused multiply-add its noise would have other bits than a CPU's.
PTX = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prism_kernels.compile_gate import configurations
row = next(row for row in configurations("sample_tokens") if row.name == "split bf16")
names = row.kernel.arg_names
signature = {name: "constexpr" if name in row.constexprs else row.signature[name] for name in names}
source = ASTSource(row.kernel, signature, {(names.index(k),): v for k, v in row.constexprs.items()}, {})
options = {"num_warps": row.num_warps, **row.options}
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
print("products", ptx.count("mul.f32") + ptx.count("mul.rn.f32"), "fused", ptx.count("fma."))
"""


def test_noise_is_made_without_fused_multiply_adds():
    code, output = run("-c", PTX, TRITON_INTERPRET="0")
    assert code == 0, output
    products, fused = (int(output.split(name)[1].split()[0]) for name in ("products", "fused"))
    assert products > 100 and fused == 0
