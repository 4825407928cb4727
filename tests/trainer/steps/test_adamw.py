"""The optimizer's state: exact masters in less memory, wherever it lies; sums of gradients in fp32; what is refused."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prism_fast.config import ClusterConfig, OptimizerConfig
from prism_fast.records import DataError
from prism_fast.steps import adamw
from prism_fast.steps.update import Updater, open_updater
from prism_fast.steps.updater import clip_factor, main_grad
from prism_kernels import split_master
from tests.oracle import assert_same, relative_error

BY_KERNEL = "adamw_step=native"  # also where float32 on a CPU would go to torch
CONFIG = OptimizerConfig(lr=1e-2, schedule="cosine", warmup_ratio=0.2, weight_decay=0.1, clip_norm=0.5)


def model(dtype=torch.float32, head=True):
    """Its head is fp32 whatever the dtype, as the discriminator's."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)).to(dtype)
    if head:
        made[2].float()
    return made


def forward(m, x):
    return m[2](m[1](m[0](x.to(m[0].weight.dtype))).to(m[2].weight.dtype))


def train(m, updater, steps, packs=1, first=0):
    """Norms of ``steps`` steps, each of so many packs."""
    norms = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for x in torch.randn(packs, 16, 6, generator=generator):
            updater.backward(forward(m, x).square().mean() / packs)
        norms.append(updater.step())
    return norms


def made(dtype=torch.bfloat16, steps=4, packs=1, **changes):
    m = model(dtype)
    updater = Updater(m, CONFIG.model_copy(update=changes), 8)
    norms = train(m, updater, steps, packs)
    return m, updater, norms


def held(root):
    """{address of a storage: bytes} of every tensor that an object holds, however deep; its own modules too."""
    found, seen, todo = {}, set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            todo += [item.grad] if item.is_leaf else []
            todo += list(vars(item).values()) if hasattr(item, "__dict__") else []
        elif isinstance(item, dict):
            todo += list(item.values())
        elif isinstance(item, (list, tuple)):
            todo += list(item)
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            todo += list(vars(item).values())
    return found


# ---- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"moments": "bfloat16"}, {"offload": True}])
def test_state_and_place_change_no_bit(dtype, changes, monkeypatch):
    """The kernel on the device, the kernel on the host, and its definition."""
    kind = {"moments": changes.get("moments", "float32")}
    with monkeypatch.context() as patched:
        patched.setenv("PRISM_IMPL", "adamw_step=reference")
        patched.setattr(adamw, "runs_kernel", lambda parameters, config: (True, "a test"))
        want, _, norms = made(dtype, packs=2, **kind)
    monkeypatch.setenv("PRISM_IMPL", BY_KERNEL)
    got, updater, again = made(dtype, packs=2, **changes)
    assert norms == again and type(updater.optimizer) is (
        adamw.HostAdamW if changes.get("offload") else adamw.KernelAdamW
    )
    for a, b in zip(want.parameters(), got.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_torchs_adamw(dtype, monkeypatch):
    """With fp32 masters; up to the rounding of four steps of some 12 operations, and of the forward that follows."""
    monkeypatch.setenv("PRISM_IMPL", BY_KERNEL)
    _, ours, norms = made(dtype)
    monkeypatch.setattr(adamw, "runs_kernel", lambda parameters, config: (False, "a test"))
    _, theirs, others = made(dtype)
    assert isinstance(theirs.optimizer, adamw.TorchAdamW)
    for i in range(len(ours.parameters)):
        assert_same(ours.optimizer.master(i), theirs.optimizer.master(i), 4 * 60, scale=1.0)
    assert_same(torch.tensor(norms), torch.tensor(others), 4 * 60)


def test_updates_far_below_a_bf16_step_add_up():
    m = model(torch.bfloat16, head=False)
    updater = Updater(m, OptimizerConfig(lr=1e-5, weight_decay=0.0), 300)
    before = [updater.optimizer.master(i).clone() for i in range(len(updater.parameters))]
    for _ in range(300):
        m(torch.randn(16, 6).bfloat16()).square().mean().backward()
        updater.step()
    for i, (parameter, start) in enumerate(zip(m.parameters(), before)):
        master = updater.optimizer.master(i)
        assert master.dtype == torch.float32 and float((master - start).abs().max()) > 5e-4
        assert torch.equal(parameter, split_master(master)[0])


def test_float32_on_a_cpu_keeps_the_bits_of_torch():
    _, updater, _ = made(torch.float32, steps=0)
    assert isinstance(updater.optimizer, adamw.TorchAdamW) and not updater.optimizer.adamw.defaults["fused"]
    by_kernel, reason = adamw.runs_kernel(updater.parameters, CONFIG)
    assert not by_kernel and "float32 on a CPU" in reason


def test_the_definition_runs_where_it_is_asked_for_and_torch_has_none(monkeypatch):
    """Kernels ruled out: torch's AdamW, which is none of them, but for bf16 moments."""
    monkeypatch.setenv("PRISM_IMPL", "reference")
    assert isinstance(made(torch.bfloat16)[1].optimizer, adamw.TorchAdamW)
    assert isinstance(made(torch.float32)[1].optimizer, adamw.TorchAdamW)
    want, updater, _ = made(torch.bfloat16, moments="bfloat16")
    assert isinstance(updater.optimizer, adamw.KernelAdamW)
    monkeypatch.delenv("PRISM_IMPL")
    for a, b in zip(want.parameters(), made(torch.bfloat16, moments="bfloat16")[0].parameters()):
        assert torch.equal(a, b)


# ---- gradients


def test_gradients_of_packs_add_up_in_fp32():
    """46 packs, as a step has: within what their own rounding leaves, where a bf16 sum errs several times more."""
    torch.manual_seed(1)
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    updater = Updater(layer, CONFIG, 8)
    truth, rounded = torch.zeros(64, 64, dtype=torch.float64), torch.zeros(64, 64, dtype=torch.bfloat16)
    for _ in range(46):
        x, up = torch.randn(32, 64).bfloat16(), torch.randn(32, 64).bfloat16()
        (layer(x) * up).sum().backward()
        assert layer.weight.grad is None  # freed as it came
        own = up.double().T @ x.double()
        truth += own
        rounded += own.bfloat16()
    total = main_grad(layer.weight)
    assert total is not None and total.dtype == torch.float32
    assert relative_error(total, truth) <= 1.2 * 2**-8 / 3**0.5 and relative_error(rounded, truth) > 2 * 2**-8 / 3**0.5
    updater.next_step()
    assert main_grad(layer.weight) is None


def test_a_tied_weight_is_taken_once_and_whole():
    weight = nn.Parameter(torch.randn(4, 4).bfloat16())

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = weight

        def forward(self, x):
            return (x @ self.a) @ self.b

    m = Tied()
    updater = Updater(m, CONFIG, 8)
    assert updater.names == ["a"]
    x = torch.randn(3, 4).bfloat16()
    want = copy.deepcopy(weight.detach()).requires_grad_()
    ((x @ want) @ want).sum().backward()
    m(x).sum().backward()
    assert torch.equal(main_grad(weight), want.grad.float())


def test_two_updaters_of_one_module_share_its_gradients():
    m = model(torch.bfloat16)
    first, second = Updater(m, CONFIG, 8), Updater(m, CONFIG, 8)
    second.backward(forward(m, torch.randn(4, 6)).sum())
    assert all(main_grad(p) is not None for p in m.parameters())
    assert second.step() > 0 and first.step() == 0


def pickled(m):
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    ("dtype", "changed"),
    [(torch.float32, nn.Module.bfloat16), (torch.bfloat16, nn.Module.float), (torch.bfloat16, pickled)],
    ids=["fp32 to bf16", "bf16 to fp32", "pickled"],
)
def test_a_module_that_was_trained_and_changed_is_trained_as_a_new_one(dtype, changed):
    first, _, _ = made(dtype, steps=1)
    copied = copy.deepcopy(first)  # copies know of no updater
    trained = []
    for m in (changed(first), changed(copied)):
        norms = train(m, Updater(m, CONFIG, 8), 2)
        assert min(norms) > 0
        trained.append(m)
    for mine, want in zip(*(m.parameters() for m in trained)):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_counts_nowhere(impl, fault, monkeypatch):
    """Neither in weights and moments nor in the correction of their bias: the next step is a first one."""
    monkeypatch.setenv("PRISM_IMPL", f"adamw_step={impl}")
    config = CONFIG.model_copy(update={"schedule": "constant", "warmup_ratio": 0.0, "moments": "bfloat16"})
    ends = []
    for faulty in (False, True):
        m = model(torch.bfloat16)
        updater = Updater(m, config, 8)
        if faulty:
            updater.backward(forward(m, torch.ones(4, 6)).sum() * fault)
            assert not torch.tensor(updater.step()).isfinite()
        train(m, updater, 2)
        ends.append([*m.parameters(), *(x for i in range(6) for x in updater.optimizer.moments(i).values())])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_the_factor_of_clipping():
    for norm, want in ((0.25, 1.0), (2.0, 0.5 / (2.0 + 1e-6)), (0.0, 1.0)):
        assert float(clip_factor(torch.tensor(norm), 0.5)) == want
    for norm in (float("inf"), float("nan")):
        assert clip_factor(torch.tensor(norm), 0.5).isnan()


# ---- memory


PLACES = [  # options, bytes a parameter between steps: of weights, and of the optimizer's state
    (torch.bfloat16, {}, 2, 10),
    (torch.bfloat16, {"moments": "bfloat16"}, 2, 6),
    (torch.float32, {"moments": "bfloat16"}, 4, 4),
]


@pytest.mark.parametrize("dtype,changes,weights,state", PLACES)
def test_resident_bytes_a_parameter(dtype, changes, weights, state):
    """4 more while a step's gradients add up: with bf16 weights and fp32 moments 16, where masters took 18 and 2 more
    for each gradient."""
    layer = nn.Sequential(nn.Linear(256, 128, bias=False), nn.Linear(128, 64, bias=False)).to(dtype)
    count = sum(p.numel() for p in layer.parameters())
    updater = Updater(layer, CONFIG.model_copy(update=changes), 8)
    assert sum(held(updater).values()) == (weights + (2 if dtype == torch.bfloat16 else 0)) * count
    for _ in range(2):
        for _ in range(2):
            layer(torch.randn(3, 256).to(dtype)).sum().backward()
        state_now = state if updater.steps else state - 2 * (2 if changes else 4)
        assert sum(held(updater).values()) == (weights + state_now + 4) * count
        updater.step()
        assert sum(held(updater).values()) == (weights + state) * count


@pytest.mark.parametrize("moments,state", [("float32", 12), ("bfloat16", 8)])
def test_resident_bytes_with_the_state_on_the_host(moments, state):
    """One piece of memory: bf16 weights, remainders and moments, room for two gradients, and what alignment takes."""
    layer = nn.Sequential(*(nn.Linear(128, 128, bias=False, dtype=torch.bfloat16) for _ in range(8)))
    count = sum(p.numel() for p in layer.parameters())
    updater = Updater(layer, CONFIG.model_copy(update={"moments": moments, "offload": True}), 8)
    optimizer = updater.optimizer
    room = optimizer.arena.memory.numel()
    assert held(updater).pop(optimizer.arena.memory.data_ptr()) == room
    assert room - (state * count + 2 * 4 * 128 * 128) <= adamw.ALIGNMENT * (4 * 8 + 2) and optimizer.arena.used <= room
    layer(torch.randn(3, 128).bfloat16()).sum().backward()
    updater.step()
    assert sum(held(updater).values()) == room + 2 * count  # what a GPU would hold: its weights


def test_bytes_moved_a_parameter(monkeypatch):
    """Of one step, by the operands of its one call: each read, and all but gradients written."""
    found = []

    def counted(parameters, gradients, remainders, averages, squares, **options):
        lists = (parameters, gradients, remainders, averages, squares)
        sizes = [sum(t.numel() * t.element_size() for t in part if t is not None) for part in lists]
        found.append((2 * sum(sizes) - sizes[1]) / sum(p.numel() for p in parameters))

    monkeypatch.setattr(adamw, "adamw_step", counted)
    for changes in ({}, {"moments": "bfloat16"}):
        made(steps=1, **changes)
    assert found == [28.0, 20.0]


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"moments": "bfloat16"}, {"offload": True}, {"offload": True, "lr": 1e-3}])
def test_a_resumed_run_goes_on_to_the_bit(dtype, changes):
    whole, updater, _ = made(dtype, steps=2, **changes)
    weights = {k: v.clone() for k, v in whole.state_dict().items()}
    saved = {k: v.clone() for k, v in updater.tensors().items()}
    assert all(v.dtype == torch.float32 for v in saved.values())
    train(whole, updater, 2, first=2)
    again = model(dtype)
    again.load_state_dict(weights)
    restored = Updater(again, updater.config, 8)
    restored.load(saved, 2)
    train(again, restored, 2, first=2)
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)
    for (name, a), b in zip(updater.tensors().items(), restored.tensors().values(), strict=True):
        assert torch.equal(a, b), name


def test_files_know_no_form(monkeypatch):
    """What torch's AdamW with fp32 masters has saved goes on in every other form from exactly there, and back."""
    with monkeypatch.context() as patched:
        patched.setattr(adamw, "runs_kernel", lambda parameters, config: (False, "a test"))
        old, updater, _ = made(torch.bfloat16)
        saved = {k: v.clone() for k, v in updater.tensors().items()}
    for changes in ({}, {"offload": True}):
        m = model(torch.bfloat16)
        m.load_state_dict(old.state_dict())
        restored = Updater(m, CONFIG.model_copy(update=changes), 8)
        restored.load(saved, 4)
        for name, value in restored.tensors().items():
            assert torch.equal(value, saved[name]), name
        assert len(saved) == 6 * 3 + 4 and list(restored.tensors()) == list(saved)
    with monkeypatch.context() as patched:
        patched.setattr(adamw, "runs_kernel", lambda parameters, config: (False, "a test"))
        back = Updater(m, CONFIG, 8)
        back.load(restored.tensors(), 4)
        assert all(torch.equal(value, saved[name]) for name, value in back.tensors().items())


def test_a_parameter_without_a_gradient_has_no_moments_and_rounds_by_its_own_number():
    """Those behind it are updated as if it had one: nothing is clipped, so that nothing else connects them."""
    ends = []
    for used in (True, False):
        m = model(torch.bfloat16)
        updater = Updater(m, CONFIG.model_copy(update={"moments": "bfloat16", "clip_norm": 1e9}), 8)
        hidden = m[0](torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).bfloat16())
        updater.backward(m[2](m[1](hidden if used else hidden.detach()).float()).square().mean())
        updater.step()
        kept = updater.tensors()
        assert ("exp_avg.0.weight" in kept) is used and "master.0.weight" in kept and kept["step.1.weight"] == 1
        ends.append({name: value for name, value in kept.items() if not name.partition(".")[2].startswith("0.")})
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


# ---- what is refused


@pytest.mark.parametrize("form", ["zero1", "zero2", "zero3"])
def test_deepspeed_has_no_bf16_moments(form):
    config = CONFIG.model_copy(update={"moments": "bfloat16"})
    with pytest.raises(DataError, match=rf"optimizer.moments = bfloat16: cluster.sharding = {form} is DeepSpeed's"):
        open_updater(model(), config, 8, ClusterConfig(sharding=form))


def test_without_the_kernel_bf16_moments_are_refused_and_the_rest_is_torchs(monkeypatch):
    monkeypatch.setattr(
        adamw, "which_impl", lambda place: {"adamw_step": ("reference", f"default on {place}; native: it is not built")}
    )
    _, updater, _ = made(torch.bfloat16, steps=2)
    assert isinstance(updater.optimizer, adamw.TorchAdamW)
    with pytest.raises(DataError, match=r"optimizer.moments = bfloat16: .*it is not built.*; set float32"):
        made(torch.bfloat16, moments="bfloat16")
    _, on_host, _ = made(torch.bfloat16, offload=True)
    assert on_host.optimizer.adamw.defaults["fused"]
    double = Updater(model(torch.float64, head=False), CONFIG, 8)
    assert isinstance(double.optimizer, adamw.TorchAdamW)


def test_pinned_memory_is_unpinned_with_what_it_was_pinned_for(monkeypatch):
    calls = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda place, room, flags: calls.append(("pin", place)) or 0,
        cudaHostUnregister=lambda place: calls.append(("unpin", place)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("wait", device.type)))
    arena = adamw._Arena(256, torch.device("cuda"))
    place = arena.memory.data_ptr()
    assert calls == [("pin", place)]
    del arena
    assert calls == [("pin", place), ("wait", "cuda"), ("unpin", place)]


def test_a_gradient_is_awaited_on_the_stream_of_its_own_gpu(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    recorded = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=recorded.append, synchronize=lambda: None))
    state = adamw.HostAdamW([nn.Parameter(torch.zeros(3))], CONFIG)
    gradient = torch.ones(3).as_subclass(OnGPU)
    ((_, arrived),) = state._fetched({0: gradient})
    assert torch.equal(arrived, torch.ones(3)) and recorded == [gradient.device]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_may_be_restored_before_the_updater_or_after(dtype):
    trained, updater, _ = made(dtype, offload=True)
    resumed = model(dtype)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    other = Updater(resumed, CONFIG.model_copy(update={"offload": True}), 8)
    resumed.load_state_dict(trained.state_dict())
    other.load(updater.tensors(), updater.steps)
    assert train(trained, updater, 2, first=4) == train(resumed, other, 2, first=4)
    assert all(map(torch.equal, trained.parameters(), resumed.parameters()))
