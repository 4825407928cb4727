"""The Triton kernels of sample_tokens without a GPU, as tests/kernels/moe/test_triton.py has them."""

import pytest

from tests.kernels.interpreter import assert_passes_interpreted, assert_passes_the_gate, needs_interpreter, run
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

pytestmark = skip_interpreted

# The kernel's ways: types and cuts, noise and none, forbidden words, what is no number.
WAYS = "(definitions and 1003) or no_number or beside or minus_infinity"


@pytest.mark.numerical
@pytest.mark.slow
@needs_interpreter
def test_interpreter():
    file = "tests/kernels/sample_tokens/test_sample_tokens.py"
    assert_passes_interpreted(file, only=WAYS)


def test_compile_gate():
    assert_passes_the_gate("sample_tokens", 3)


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
