"""The backends of the experts' GEMMs: each against float64, forced one by one; and how the choice is made and kept.

What needs a GPU is marked; test_triton.py runs this file in Triton's interpreter too.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from prism_kernels import moe_mlp
from prism_kernels.moe import grouped_gemm, grouped_gemm_choice, load_product_choices, product_choices, settle_products
from tests.kernels.linear_logprob.linear_cases import INTERPRETED, skip_interpreted
from tests.kernels.moe.test_moe import HALF, LOADS, arranged, fixed_routing, mlp_truth, normal, weights
from tests.oracle import assert_as_exact

ROOT = Path(__file__).parents[3]
BF16 = torch.bfloat16
E, H, I, S = 5, 72, 56, 150  # H and I are multiples of 8 alone: what the library's 16 bytes allow at the least
OFFSETS = {
    "even": [0, 30, 60, 90, 120, 150],
    "one": [0, 0, 0, 0, 150, 150],
    "empty": [0, 0, 7, 7, 150, 150],
}
on_gpu = [pytest.param(name, "cuda", BF16, marks=pytest.mark.gpu) for name in grouped_gemm.BACKENDS]
if INTERPRETED:  # its products of bf16 are wrong, torch's are not
    CASES = [("torch", "cpu", BF16), ("triton", "cpu", HALF), ("loop", "cpu", BF16)]
else:
    CASES = [("loop", "cpu", BF16), *on_gpu]
KERNEL_DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def poisoned():
    """What an operation leaves unwritten is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def backend(name, device, gate_up, down):
    reason = grouped_gemm.why_not(name, gate_up, down)
    if reason is not None and device == "cuda":
        pytest.skip(f"{name}: {reason}")
    return grouped_gemm.load(name)


def experts(layout, device, dtype):
    """gate_up (E, 2I, H) and down (E, H, I), strided as a checkpoint of this layout is."""
    leaves = (w.detach() for w in weights(E, H, I, layout, device, dtype))
    return [w.transpose(1, 2) if layout == "v4" else w for w in leaves]


@pytest.mark.parametrize("load", list(OFFSETS))
@pytest.mark.parametrize("layout", ["v5", "v4"])
@pytest.mark.parametrize(("name", "device", "dtype"), CASES)
def test_rows(name, device, dtype, layout, load, poisoned):
    edges = OFFSETS[load]
    offset = torch.tensor(edges, dtype=torch.int32, device=device)
    pair = experts(layout, device, dtype)
    table = backend(name, device, *pair)
    for weight in pair:
        for b in (weight, weight.transpose(1, 2)):
            a = normal(S, b.shape[1], device=device, dtype=dtype, seed=3)
            got = table.rows(a, b, offset)
            parts = [(a[i:j], b[e]) for e, (i, j) in enumerate(pairwise(edges))]
            truth = torch.cat([x.double() @ w.double() for x, w in parts])
            assert got.shape == truth.shape and got.dtype == dtype
            assert_as_exact(got, truth, torch.cat([x @ w for x, w in parts]), b.shape[1], f"{name} {tuple(b.stride())}")


@pytest.mark.parametrize("load", list(OFFSETS))
@pytest.mark.parametrize("layout", ["v5", "v4"])
@pytest.mark.parametrize(("name", "device", "dtype"), CASES)
def test_outer(name, device, dtype, layout, load, poisoned):
    """Weight gradients, strided as the weights ("v4" is column-major here), and zeros for an expert without rows."""
    edges = OFFSETS[load]
    offset = torch.tensor(edges, dtype=torch.int32, device=device)
    pair = experts(layout, device, dtype)
    table = backend(name, device, *pair)
    for like in pair:
        _, m, n = like.shape
        a, b = (normal(S, size, device=device, dtype=dtype, seed=size) for size in (m, n))
        got = table.outer(a, b, offset, like)
        parts = [(a[i:j].T, b[i:j]) for i, j in pairwise(edges)]
        truth = torch.stack([x.double() @ y.double() for x, y in parts])
        assert got.shape == like.shape and got.stride() == like.stride() and got.dtype == dtype
        assert_as_exact(got, truth, torch.stack([x @ y for x, y in parts]), S, f"{name} {tuple(like.stride())}")
        assert not got[offset.diff() == 0].any()


@pytest.mark.parametrize("layout", ["v5", "v4"])
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_nothing_is_assumed_of_the_library_where_an_expert_has_no_rows(device, layout, monkeypatch):
    like = experts(layout, device, BF16)[0]
    backend("torch", device, *experts(layout, device, BF16))
    a, b = (normal(S, size, device=device, dtype=BF16) for size in like.shape[1:])
    offset = torch.tensor(OFFSETS["empty"], dtype=torch.int32, device=device)
    library = grouped_gemm._library_grouped()

    def grouped(*operands, offs):
        result = library(*operands, offs=offs)
        result[[0, 2]] = float("nan")
        return result

    monkeypatch.setattr(grouped_gemm, "_library_grouped", lambda: grouped)
    got = grouped_gemm._torch_outer(a, b, offset, like)
    assert not got[[0, 2]].any() and got[[1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_clear_empty(device):
    """Zeros for experts without rows, of more cells than a block has; the others keep what they hold."""
    from prism_kernels.moe import triton_grouped_gemm

    out = torch.full((4, 96, 96), float("nan"), device=device, dtype=BF16)
    assert out[0].numel() > triton_grouped_gemm.CLEAR_BLOCK
    triton_grouped_gemm.clear_empty(out, torch.tensor([0, 0, 9, 9, 12], dtype=torch.int32, device=device))
    assert not out[[0, 2]].any() and out[[1, 3]].isnan().all()


@arranged
@pytest.mark.parametrize(
    ("name", "device", "dtype"), [("triton", "cpu", HALF), ("loop", "cpu", HALF)] if INTERPRETED else on_gpu
)
def test_mlp_by_every_backend(name, device, dtype, layout, load, monkeypatch, poisoned):
    """Forward and backward of the whole op with the GEMMs pinned."""
    tokens = 24 if INTERPRETED else 40
    index = LOADS[load](tokens, 2, E).to(device)
    x = normal(tokens, H, device=device, dtype=dtype, seed=5).requires_grad_()
    weight = torch.rand(tokens, 2, device=device).requires_grad_()
    leaves = (x, *weights(E, H, I, layout, device, dtype), weight)
    backend(name, device, *experts(layout, device, dtype))
    monkeypatch.setenv("PRISM_GROUPED_MM", name)
    routing = fixed_routing(index, weight, E)
    d_out = normal(tokens, H, device=device, dtype=dtype, seed=7)
    ours = moe_mlp(*leaves[:3], routing, layout=layout, impl="triton")
    found = [ours, *torch.autograd.grad(ours, leaves, d_out)]

    def plain(x, gate_up, down, weight):
        pair = [w.transpose(1, 2) if layout == "v4" else w for w in (gate_up, down)]
        return mlp_truth(x, *pair, index, weight.to(x.dtype))

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth, eager = plain(*exact), plain(*leaves)
    expected = [truth, *torch.autograd.grad(truth, exact, d_out.double())]
    theirs = [eager, *torch.autograd.grad(eager, leaves, d_out)]
    for what, mine, true, other in zip(("output", "x", "gate_up", "down", "weight"), found, expected, theirs):
        assert_as_exact(mine, true, other, 2 * (H + I) + tokens, f"{name} {what}")


GATE_UP, DOWN = (torch.zeros(4, *shape, device="meta", dtype=BF16) for shape in ((96, 64), (64, 48)))


@skip_interpreted
class TestChoice:
    """Meta tensors stand for a GPU's: nothing is computed, only chosen."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.delenv("PRISM_GROUPED_MM", raising=False)
        monkeypatch.setattr(grouped_gemm_choice, "_choices", {})
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        self.measured = []

        def measure(backend, gate_up, down):
            self.measured.append(backend.name)
            return {"torch": 2.0, "triton": 1.0, "loop": 3.0}[backend.name]

        monkeypatch.setattr(grouped_gemm_choice, "_measure", measure)

    CASE = "NVIDIA H200 bfloat16 E4 H64 I48 v5"

    def test_it_is_fixed_on_a_cpu_and_can_be_pinned(self, monkeypatch):
        gate_up, down = experts("v5", "cpu", BF16)
        assert grouped_gemm_choice.choose(gate_up, down).name == "loop"
        monkeypatch.setenv("PRISM_GROUPED_MM", "loop")
        assert grouped_gemm_choice.choose(GATE_UP, DOWN).name == "loop" and product_choices() == {}
        monkeypatch.setenv("PRISM_GROUPED_MM", "torch")
        with pytest.raises(RuntimeError, match=r"PRISM_GROUPED_MM=torch cannot run: it is for CUDA.*'loop'"):
            grouped_gemm_choice.choose(gate_up, down)
        monkeypatch.setenv("PRISM_GROUPED_MM", "cublas")
        with pytest.raises(ValueError, match="PRISM_GROUPED_MM: expected one of torch, triton, loop, got 'cublas'"):
            grouped_gemm_choice.choose(gate_up, down)
        assert not self.measured

    def test_it_is_measured_once_and_kept(self):
        assert [grouped_gemm_choice.choose(GATE_UP, DOWN).name for _ in range(3)] == ["triton"] * 3
        assert self.measured == ["triton", "loop"]
        assert product_choices() == {self.CASE: "triton"}

    def test_the_library_is_taken_where_it_serves(self, monkeypatch):
        monkeypatch.setattr(grouped_gemm_choice, "why_not", lambda name, *pair: None)
        assert grouped_gemm_choice.choose(GATE_UP, DOWN).name == "torch" and not self.measured
        assert product_choices() == {self.CASE: "torch"}

    def test_a_case_is_what_changes_the_operands_and_nothing_else(self):
        cases = [
            (GATE_UP, DOWN),
            (GATE_UP.transpose(1, 2).contiguous().transpose(1, 2), DOWN.transpose(1, 2).contiguous().transpose(1, 2)),
            (GATE_UP.half(), DOWN.half()),
            (GATE_UP[:2], DOWN[:2]),
            (GATE_UP[:, :72], DOWN[:, :, :36]),  # rows of 72 bytes: the library's 16 do not fit
            (GATE_UP[:, :, :32], DOWN[:, :32]),
        ]
        names = [grouped_gemm_choice._case(*pair) for pair in cases]
        assert names[:2] == [self.CASE, self.CASE.replace("v5", "v4")] and names[4].endswith("unaligned")
        assert len(set(names)) == len(names)

    def test_a_loaded_choice_is_taken_and_not_measured(self):
        load_product_choices({self.CASE: "loop"})
        assert grouped_gemm_choice.choose(GATE_UP, DOWN).name == "loop" and not self.measured
        with pytest.raises(ValueError, match=r"choices: expected one of torch.*, got 'fast' of 'x'"):
            load_product_choices({"x": "fast"})
        assert product_choices() == {self.CASE: "loop"}

    def test_a_loaded_choice_that_cannot_run_is_an_error(self):
        """The checkpoint of another torch: what this one would take instead gives other bits."""
        load_product_choices({self.CASE: "torch"})
        with pytest.raises(RuntimeError, match=r"'torch', chosen by an earlier run, cannot run: .*PRISM_GROUPED_MM"):
            grouped_gemm_choice.choose(GATE_UP, DOWN)

    def test_a_capture_measures_nothing_and_keeps_nothing(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert grouped_gemm_choice.choose(GATE_UP, DOWN).name == "triton"
        assert not self.measured and product_choices() == {}

    def test_a_rank_measures_only_where_ranks_settle(self, monkeypatch):
        monkeypatch.setattr(grouped_gemm_choice, "_num_processes", lambda: 2)
        assert grouped_gemm_choice.choose(GATE_UP, DOWN).name == "triton" and not self.measured
        monkeypatch.setattr(grouped_gemm_choice, "_choices", {})
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        sent = torch.frombuffer(bytearray(json.dumps({self.CASE: "loop"}).encode()), dtype=torch.uint8)

        def broadcast(tensor, src):
            assert src == 0
            if torch.distributed.get_rank() != 0:
                tensor.copy_(sent if tensor.dtype == torch.uint8 else torch.tensor([sent.numel()]))

        monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
        settle_products(GATE_UP, DOWN)
        assert grouped_gemm_choice.choose(GATE_UP, DOWN).name == "loop" and not self.measured
        monkeypatch.setattr(grouped_gemm_choice, "_choices", {})
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
        settle_products(GATE_UP, DOWN)
        assert self.measured == ["triton", "loop"] and product_choices() == {self.CASE: "triton"}


SETTLE = """
import sys, torch
from prism_kernels.moe import load_product_choices, product_choices, settle_products
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
load_product_choices({"a": "loop", "b": "torch"} if rank == 0 else {"a": "triton"})
settle_products(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))
print(product_choices())
torch.distributed.destroy_process_group()
"""


@skip_interpreted
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ranks_take_what_rank_0_has(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SETTLE, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        said, errors = rank.communicate(timeout=120)
        assert said == "{'a': 'loop', 'b': 'torch'}\n", errors


@skip_interpreted
class TestMeasurement:
    def test_its_size_depends_on_the_shape_and_is_bounded(self):
        for width, intermediate, itemsize in ((2048, 6144, 2), (2048, 768, 2), (4096, 14336, 2), (2048, 6144, 4)):
            slots = grouped_gemm_choice._measured_slots(4, width, intermediate, itemsize)
            assert 4096 <= slots <= grouped_gemm_choice.MEASURED_SLOTS and slots % 128 == 0
            assert 2 * slots * max(width, 2 * intermediate) * itemsize <= grouped_gemm_choice.MEASURED_BYTES
        assert grouped_gemm_choice._measured_slots(64, 64, 32, 2) == grouped_gemm_choice.MEASURED_SLOTS
        assert grouped_gemm_choice._measured_slots(64, 1 << 24, 32, 2) == 64  # a row per expert at the least

    def test_operands_share_one_bounded_buffer(self, monkeypatch):
        class Event:
            def __init__(self, **options):
                pass

            def record(self):
                pass

            synchronize = record

            def elapsed_time(self, end):
                return 2.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(grouped_gemm_choice, "MEASURED_BYTES", 1 << 16)
        operands, shapes = [], set()

        def rows(a, b, offset):
            operands.append(a)
            shapes.add((a.shape[1], b.shape[1], b.shape[2]))
            return grouped_gemm._loop_rows(a, b, offset)

        def outer(a, b, offset, like):
            operands.extend((a, b))
            return grouped_gemm._loop_outer(a, b, offset, like)

        gate_up, down = (w.requires_grad_() for w in experts("v4", "cpu", torch.float32))
        state = torch.get_rng_state()
        assert grouped_gemm_choice._measure(grouped_gemm.GroupedGemm("spy", rows, outer), gate_up, down) == 2e-3
        assert torch.equal(torch.get_rng_state(), state)
        storages = {a.untyped_storage().data_ptr(): a.untyped_storage().nbytes() for a in operands}
        assert len(storages) == 1 and 0 < 2 * sum(storages.values()) <= 1 << 16
        assert {a.shape[0] for a in operands} == {grouped_gemm_choice._measured_slots(E, H, I, 4)}
        assert shapes == {(H, H, 2 * I), (I, I, H), (H, H, I), (2 * I, 2 * I, H)}
