"""AdamW: every implementation gives the definition's bits, and the definition is AdamW."""

import ctypes
import itertools
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from prism_kernels import adamw_step, cuda_gate, dispatch, join_master, native, split_master, which_impl
from prism_kernels.adamw import reference
from prism_kernels.adamw.table import Constants, Factors, Operands, constants, factors, key, tables
from tests.oracle import assert_as_exact, assert_same

SIZES = (1, 0, 7, 63, 1003, 33_000)  # 33,000: two chunks
KINDS = list(itertools.product((False, True), repeat=3))  # split weights, bf16 gradients, bf16 moments
kinds = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: "-".join(n for n, on in zip(("split", "g16", "m16"), kind) if on) or "fp32"
)
NOT_BUILT = native.need_cuda()
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT))]
OTHERS = ["native", pytest.param("cuda", marks=ON_A_GPU)]
STRANGE = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 3e38, -1e-30])


def bits(tensor):
    return tensor.cpu().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def assert_same_bits(one, other):
    for x, y in zip(one, other, strict=True):
        if x is not None:
            assert torch.equal(bits(x), bits(y)), (bits(x) != bits(y)).nonzero()[:3].tolist()


def state(kind, sizes=SIZES, seed=0, offset=0):
    """Operands with gradients of all sizes of numbers, those that are strange among them; ``offset``: elements by which
    each tensor's first one lies behind an aligned address."""
    split, g16, m16 = kind
    generator = torch.Generator().manual_seed(seed)

    def at(tensor):
        return torch.cat([tensor.new_zeros(offset), tensor])[offset:]

    made = Operands([], [], [], [], [])
    for size in sizes:
        weight = torch.randn(size, generator=generator)
        parameter, remainder = split_master(weight) if split else (weight, None)
        made.parameter.append(at(parameter))
        made.remainder.append(None if remainder is None else at(remainder))
        made.gradient.append(at(gradient(size, g16, generator)))
        for moments in (made.exp_avg, made.exp_avg_sq):
            moments.append(at(torch.zeros(size, dtype=torch.bfloat16 if m16 else torch.float32)))
    return made


def gradient(size, g16, generator):
    exponent = torch.rand(size, generator=generator) * 30 - 22
    values = torch.randn(size, generator=generator) * 10**exponent
    if size > 100:
        values[:: size // 20] = STRANGE.repeat(8)[: len(values[:: size // 20])]
    return values.bfloat16() if g16 else values


def copy(operands, device="cpu"):
    return Operands(*([None if x is None else x.clone().to(device) for x in held] for held in operands))


def steps(operands, impl, kind, count=3, first=1, clip=0.37):
    """``count`` steps with new gradients each, in place."""
    size = len(operands.parameter)
    device = operands.parameter[0].device
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 + step)
        for old in operands.gradient:
            old.copy_(gradient(old.numel(), kind[1], generator))
        adamw_step(
            *operands, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=[0.1 * (i % 2) for i in range(size)],
            step=[step + i % 3 for i in range(size)], clip=torch.tensor(clip, device=device), seed=5, impl=impl,
        )  # fmt: skip
    return operands


@kinds
@pytest.mark.parametrize("impl", OTHERS)
def test_an_implementation_gives_the_bits_of_the_definition(impl, kind):
    start = state(kind)
    want, got = (steps(copy(start, d), i, kind) for i, d in (("reference", "cpu"), (impl, _device(impl))))
    for ours, theirs in zip(got, want):
        assert_same_bits(ours, theirs)
    assert not torch.equal(bits(got.parameter[4]), bits(start.parameter[4]))


def _device(impl):
    return "cuda" if impl == "cuda" else "cpu"


def one_table(operands, number, chunk=None):
    (table,) = tables(operands, [number] * len(operands.parameter), chunk or native.library().ADAMW_CHUNK)
    return table


SHARED, ONE = constants((0.9, 0.99), 1e-8), factors(1e-2, (0.9, 0.99), 0.1, 3, key(1, 2, 3))


@kinds
def test_no_width_of_vectors_and_no_number_of_threads_changes_a_bit(kind):
    start = state(kind, sizes=(0, 1003, 100_000, 0))
    want = copy(start)
    reference.adamw_step(want, [ONE] * 4, SHARED, torch.tensor(0.37))
    for width, threads in itertools.product((0, 256, 512), (1, 3)):
        got = copy(start)
        table = one_table(got, ONE)
        native.library().adamw_step(table.rows, table.kind, SHARED, reference_scale(0.37), threads, width)
        for ours, theirs in zip(got, want):
            assert_same_bits(ours, theirs)


def reference_scale(value):
    return float(torch.tensor(value))


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None or not cuda_gate.sources():
        pytest.skip("needs g++ and csrc/")
    out = tmp_path_factory.mktemp("cuda") / "kernel.so"
    source = Path(__file__).parent / "cuda_on_host.cpp"
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", f"-I{cuda_gate.CSRC}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(out)], check=True, capture_output=True)
    return ctypes.CDLL(str(out))


@kinds
@pytest.mark.parametrize("offset", [0, 1])  # 1: no load of several numbers is aligned
def test_the_gpus_kernel_gives_the_bits_of_the_definition_as_plain_code(cuda_on_host, kind, offset):
    """Its search for a block's tensor, its aligned loads, its ends: what a GPU adds is that blocks run at once."""
    start = state(kind, sizes=(0, 0, 5, 1003, 1, 70_001, 0, 4096, 0), offset=offset)
    want, got = copy(start), state(kind, sizes=(0, 0, 5, 1003, 1, 70_001, 0, 4096, 0), offset=offset)
    reference.adamw_step(want, [ONE] * 9, SHARED, torch.tensor(0.37))
    table = one_table(got, ONE)
    assert table.num_chunks == 7
    rows = ctypes.create_string_buffer(table.rows)
    pack = (ctypes.c_float * 4)(*SHARED)
    for scale in (float("nan"), 0.37):  # the first writes nothing
        cuda_on_host.run(rows, table.num_rows, table.num_chunks, table.kind, pack, (ctypes.c_float * 1)(scale))
    for ours, theirs in zip(got, want):
        assert_same_bits(ours, theirs)


# ---- what is computed


def test_the_definition_is_adamw():
    """Ten steps against torch.optim.AdamW in float64; as exact as torch's in fp32."""
    truth, eager, ours = (torch.randn(1003).double() for _ in range(3))
    eager, ours = truth.float(), truth.float()
    moments = [torch.zeros(1003), torch.zeros(1003)]
    leaves = [torch.nn.Parameter(truth.clone()), torch.nn.Parameter(eager.clone())]
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW([leaf], **options) for leaf in leaves]
    for step in range(1, 11):
        g = torch.randn(1003)
        for leaf, optimizer in zip(leaves, optimizers):
            leaf.grad = (g * 0.5).to(leaf.dtype)
            optimizer.step()
        adamw_step([ours], [g], None, moments[:1], moments[1:], step=step, clip=torch.tensor(0.5), **options)
    assert_as_exact(ours, *leaves, terms=10 * 12)
    kept = [optimizer.state[leaf] for leaf, optimizer in zip(leaves, optimizers)]
    for name, moment in zip(("exp_avg", "exp_avg_sq"), moments):
        assert_as_exact(moment, kept[0][name], kept[1][name], terms=10 * 4)


def nearest(exact):
    """The fp32 number nearest to a fraction, ties to even; written without floating point."""
    sign, exact = (-1 if exact < 0 else 1), abs(exact)
    if exact == 0:
        return 0.0
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= exact < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return sign * float(round(exact / unit) * unit)  # round(): ties to even


def test_fma_is_rounded_once():
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(3000).astype(np.float32) for _ in range(3))
    c[1000:2000] = -(a * b)[1000:2000]  # what is left is the product's rounding
    c[2000:] *= np.float32(2.0) ** generator.integers(-60, 60, 1000)
    # Half an fp32 unit off by what fp64 does not see: rounding twice errs here.
    a[:2], b[:2], c[:2] = 1 + 2.0**-12, 1 + 2.0**-12, [2.0**-60, -(2.0**-60)]
    a[2:4], b[2:4], c[2:4] = 1.0, 1 + 2.0**-23, [2.0**-24, -(2.0**-24)]
    a[4:6], b[4:6], c[4:6] = 2.0**-60, [1.0, -1.0], 1 + 2.0**-23
    got = reference.fma(*map(torch.from_numpy, (a, b, c))).tolist()
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c)]
    assert got == [nearest(value) for value in exact]
    half = torch.tensor([2.0**-24 * (1 + 2.0**-20)])  # 1 + half a unit and a little, which fp64's sum cuts to the tie
    tie = reference.fma(half, torch.tensor([1.0]), torch.tensor([1.0]))
    assert tie.item() == nearest(1 + Fraction(half.item())) == 1 + 2.0**-23


def test_the_root_is_rounded_once():
    values = torch.rand(20_000) * 10 ** (torch.rand(20_000) * 60 - 35)
    for value, root in zip(values.tolist(), reference.root(values).tolist()):
        low, high = (np.nextafter(np.float32(root), np.float32(edge)) for edge in (0, np.inf))
        middle = [(Fraction(root) + Fraction(float(edge))) / 2 for edge in (low, high)]
        assert middle[0] ** 2 <= Fraction(value) <= middle[1] ** 2


@pytest.mark.parametrize("impl", ["reference", *OTHERS])
@pytest.mark.parametrize("clip", [float("nan"), float("inf"), -float("inf")])
def test_a_factor_that_is_not_finite_writes_nothing(impl, clip):
    for kind in KINDS:
        start = state(kind)
        got = steps(copy(start, _device(impl)), impl, kind, count=1, clip=clip)
        for name in ("parameter", "remainder", "exp_avg", "exp_avg_sq"):
            assert_same_bits(getattr(got, name), getattr(start, name))


@kinds
def test_no_factor_is_a_factor_of_one(kind):
    one, other = state(kind), state(kind)
    for operands, clip in ((one, None), (other, torch.tensor(1.0))):
        adamw_step(*operands, lr=0.1, step=1, clip=clip)
    for ours, theirs in zip(one, other):
        assert_same_bits(ours, theirs)


def test_bytes_moved_and_launches():
    """Every number is read once and all but gradients written once: at most 30 bytes a parameter in one table."""
    per_kind = {}
    for kind in KINDS:
        held = state(kind, sizes=(1003,))
        read = sum(t.element_size() for (t,) in held if t is not None)
        per_kind[kind] = 2 * read - held.gradient[0].element_size()
        many = state(kind, sizes=(5, 70, 3, 0, 1003))
        (table,) = tables(many, [ONE] * 5, native.library().ADAMW_CHUNK)
        assert table.num_rows == 5
    assert per_kind[False, False, False] == per_kind[True, False, False] == 28
    assert per_kind[True, False, True] == 20 and max(per_kind.values()) <= 30


# ---- bf16 weights and their remainders


def masters():
    """fp32 of every exponent, with every lower half that decides; infinities and quiet NaN."""
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    random = torch.randint(-(1 << 31), 1 << 31, (1_000_000,), dtype=torch.int64).to(torch.int32)
    values = torch.cat([(upper[:, None] | lower).flatten(), random]).view(torch.float32)
    signalling = values.isnan() & (values.view(torch.int32) & 0x00400000 == 0)
    return values[~signalling], values[signalling]


def test_weight_and_remainder_are_the_master():
    quiet, signalling = masters()
    weight, remainder = split_master(quiet)
    assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert torch.equal(bits(join_master(weight, remainder)), bits(quiet))
    assert torch.equal(weight.isnan(), quiet.isnan())
    assert len(signalling) > 1000
    back = join_master(*split_master(signalling))
    assert torch.equal(bits(back), bits(signalling) | 0x00400000)


def test_the_weight_is_the_nearest_and_ties_go_outwards():
    quiet, _ = masters()
    finite = quiet[quiet.isfinite() & (quiet.abs() < 3e38)]
    weight, remainder = split_master(finite)
    below = (finite.view(torch.int32) & -0x10000).view(torch.float32).double()  # towards 0
    above = ((finite.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).double()
    middle, exact = (below + above).abs() / 2, finite.double().abs()
    assert torch.equal(weight.double(), torch.where(exact >= middle, above, below))
    tie = remainder == -(1 << 15)
    assert torch.equal(weight[~tie], finite[~tie].bfloat16()) and bool(tie.any())
    overflow = torch.tensor([3.4028235e38, -3.4028235e38])
    assert torch.equal(split_master(overflow)[0], overflow.bfloat16())
    assert torch.equal(join_master(*split_master(overflow)), overflow)


def test_every_remainder_of_a_weight_is_another_master():
    remainder = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    for value in (1.0, -1.0, 1.5, 2.0, 0.0, -0.0, 1e-40, float("inf")):
        weight = torch.full((1 << 16,), value, dtype=torch.bfloat16)
        master = join_master(weight, remainder)
        ours = split_master(master)
        known = ~master.isnan()  # past infinity
        assert torch.equal(ours[0][known].view(torch.int16), weight[known].view(torch.int16))
        assert torch.equal(ours[1][known], remainder[known]) and int(known.sum()) >= 1 << 15
        assert len(bits(master).unique()) == 1 << 16


def test_updates_far_below_a_bf16_step_add_up():
    weight, remainder = split_master(torch.ones(4))
    m, v = torch.zeros(4), torch.zeros(4)
    for step in range(1, 101):
        adamw_step([weight], [torch.ones(4)], [remainder], [m], [v], lr=1e-6, weight_decay=0.0, step=step)
    moved = 1 - join_master(weight, remainder)
    assert_same(moved, torch.full((4,), 1e-4), 100, scale=1.0)
    assert torch.equal(weight, torch.ones(4).bfloat16())


# ---- stochastic rounding


def test_bf16_moments_are_right_in_the_mean():
    n = 1 << 20
    for fraction in (0.0, 1 / 65536, 0.25, 0.5, 0.9):
        low = torch.tensor(1.0)
        value = (low.view(torch.int32) + round(fraction * 65536)).view(torch.float32).expand(n)
        random = reference.random_bits(key(0, 1, 2), value)
        for shift in (0, 16):
            rounded = reference.round_stochastically(value.contiguous(), (random >> shift) & 0xFFFF).float()
            up = float((rounded > 1).double().mean())
            assert set(rounded.unique().tolist()) <= {1.0, 1 + 2.0**-7}
            assert abs(up - fraction) <= 6 * (fraction * (1 - fraction) / n) ** 0.5, (fraction, shift, up)
    kept = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1.5])
    again = reference.round_stochastically(kept, torch.full((5,), 0xFFFF))
    assert torch.equal(again.view(torch.int16), kept.bfloat16().view(torch.int16))
    assert reference.round_stochastically(STRANGE[:1], torch.tensor([0xFFFF])).isnan().all()


def test_random_bits_depend_on_seed_step_tensor_and_element_and_look_like_chance():
    n = 1 << 16
    like = torch.zeros(n)
    draws = [reference.random_bits(key(*place), like) for place in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1))]
    assert torch.equal(draws[0], reference.random_bits(key(0, 1, 0), like))
    bound = 6 * 0.5 * n**-0.5  # six deviations of the mean of n fair bits
    for i, one in enumerate(draws):
        table = (one[:, None] >> torch.arange(32)) & 1
        assert float((table.double().mean(0) - 0.5).abs().max()) <= bound
        assert float(((table[1:] ^ table[:-1]).double().mean(0) - 0.5).abs().max()) <= bound  # neighbours
        for other in draws[:i]:
            both = ((one ^ other)[:, None] >> torch.arange(32)) & 1
            assert float((both.double().mean(0) - 0.5).abs().max()) <= bound
    assert len({key(a, b, c) for a in range(9) for b in range(9) for c in range(9)}) == 729


@kinds
def test_a_resumed_run_repeats_every_bit(kind):
    whole = steps(state(kind), "auto", kind, count=4)
    half = steps(state(kind), "auto", kind, count=2)
    rest = steps(copy(half), "auto", kind, count=2, first=3)
    for ours, theirs in zip(rest, whole):
        assert_same_bits(ours, theirs)


def test_the_number_of_a_tensor_is_its_own_not_its_place():
    """Where a tensor has no gradient in a step, those behind it round as if it had."""
    kind = (False, False, True)
    both, alone = state(kind, sizes=(63, 1003)), state(kind, sizes=(63, 1003))
    adamw_step(*both, lr=0.1, step=1)
    adamw_step(*([held[1]] for held in alone), lr=0.1, step=1, numbers=[1])
    for ours, theirs in zip(alone, both):
        assert_same_bits(ours[1:], theirs[1:])
    adamw_step(*([held[0]] for held in alone), lr=0.1, step=1, numbers=[1])
    assert not torch.equal(alone.exp_avg[0], both.exp_avg[0])


# ---- contract


def valid():
    held = state((True, False, False), sizes=(3, 2))
    return dict(zip(("parameters", "gradients", "remainders", "exp_avgs", "exp_avg_sqs"), map(list, held)))


REFUSED = [
    ({"gradients": [torch.ones(3)]}, r"gradients: expected 2 entries, as parameters has, got 1"),
    ({"gradients": [torch.ones(3), torch.ones(3)]}, r"gradients\[1\]: expected float32 or bfloat16 \(d0 = 2,\), got"),
    ({"gradients": [torch.ones(3), torch.ones(2).double()]}, r"gradients\[1\]: .* got \(2,\) torch.float64"),
    ({"gradients": [torch.ones(3), torch.ones(2, 2)[:, 0]]}, r"gradients\[1\]: expected a contiguous .*; contiguous"),
    (
        {"parameters": [torch.ones(3).bfloat16(), torch.ones(2).half()]},
        r"parameters\[1\]: expected float32 or bfloat16",
    ),
    ({"parameters": [torch.ones(3).bfloat16(), torch.ones(2)]}, r"remainders\[1\]: expected None beside float32"),
    ({"remainders": None}, r"remainders\[0\]: expected a tensor beside bfloat16, got None; split_master"),
    ({"remainders": [torch.ones(3).short(), torch.ones(2).int()]}, r"remainders\[1\]: expected int16"),
    ({"exp_avgs": [torch.ones(3), torch.ones(2).bfloat16()]}, r"exp_avg_sqs\[1\]: expected bfloat16"),
    ({"exp_avgs": [torch.ones(3), "x"]}, r"exp_avgs\[1\]: .* got no tensor but str"),
    ({"exp_avgs": [torch.ones(3, device="meta"), torch.ones(2)]}, r"exp_avgs\[0\]: expected a tensor on cpu"),
    ({"step": 0}, r"step: expected an integer in \[1, "),
    ({"step": [1]}, r"step: expected 2 entries"),
    ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\)"),
    ({"betas": 0.9}, r"betas: expected two numbers"),
    ({"weight_decay": [0.1, -0.1]}, r"weight_decay: expected a finite number >= 0"),
    ({"clip": 0.5}, r"clip: expected float32 \(\), got no tensor but float"),
    ({"clip": torch.tensor(1.0, device="meta")}, r"clip: expected a tensor on cpu, as parameters\[0\] is"),
    ({"numbers": 3}, r"numbers: expected a list of integers"),
]


@pytest.mark.parametrize("changed,said", REFUSED, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(REFUSED)])
def test_what_does_not_fit_is_named_and_nothing_is_written(changed, said):
    arguments = {**valid(), "lr": 0.1, "step": 1, **changed}
    before = [x.clone() for x in valid()["exp_avgs"]]
    with pytest.raises(ValueError, match=said):
        adamw_step(**arguments)
    if "exp_avgs" not in changed:
        assert_same_bits(arguments["exp_avgs"], before)


def test_nothing_to_update_is_no_step():
    adamw_step([], [], [], [], [], lr=0.1, step=1)
    adamw_step([], [], None, [], [], lr=0.1, step=[])


def test_parameters_that_require_grad_change_and_a_stale_graph_is_refused():
    leaf = torch.nn.Parameter(torch.ones(3))
    loss = (leaf * leaf).sum()
    adamw_step([leaf], [torch.ones(3)], None, [torch.zeros(3)], [torch.zeros(3)], lr=0.1, step=1)
    assert float(leaf.detach().max()) < 1 and leaf.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gpu_runs_one_launch_and_tensors_without_storage_pass(monkeypatch):
    """What a GPU's default is, and why it would not run; on meta there is nothing to tell."""
    op = dispatch._OPS["adamw_step"]
    assert next(iter(op.table)) == "cuda" and op.auto("meta")[0] == "cuda"
    held = Operands(*([x.to("meta") for x in part] for part in state((True, True, True))))
    adamw_step(*held, lr=0.1, step=1)
    assert which_impl("cpu")["adamw_step"][0] == "native"
    if not native.library().CUDA:
        assert "PRISM_BUILD_CUDA=1" in native.need_cuda()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        chosen, reason = op.auto("cuda")
        assert chosen == "reference" and "without its CUDA part" in reason


def test_the_table_is_what_the_extension_reads():
    assert Constants(*SHARED) == SHARED and Factors(*ONE) == ONE
    assert one_table(state((True, True, True)), ONE).kind == 7 and one_table(state(KINDS[0]), ONE).kind == 0
    mixed = [state(kind, sizes=(5,)) for kind in KINDS]
    together = Operands(*([x for held in mixed for x in held[i]] for i in range(5)))
    assert sorted(table.kind for table in tables(together, [ONE] * 8, 10)) == list(range(8))


@pytest.mark.skipif(cuda_gate.need_nvcc() is not None, reason=str(cuda_gate.need_nvcc()))
def test_the_cuda_source_compiles_without_spills():
    (source,) = cuda_gate.sources()
    found = cuda_gate.compile_source(source, 90)
    assert len(found) == 8 and len({kernel.name for kernel in found}) == 8
    for kernel in found:
        assert kernel.local_bytes == 0 and 0 < kernel.registers <= 64, kernel  # 64: 1,024 threads a processor
        assert kernel.name.startswith("adamw_step_kernel<"), kernel


def test_a_spill_is_read():
    text = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'\nptxas info    : Function properties for _Z1kv\n"
        "    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 4096 bytes smem\n"
    )
    assert cuda_gate.read_ptxas(text) == [cuda_gate.Compiled("_Z1kv", 255, 24, 4096)]
