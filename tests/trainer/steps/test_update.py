"""AdamW with fp32 masters, schedule, clipping; the order of the data."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from prism_fast.config import ClusterConfig, OptimizerConfig
from prism_fast.data.order import order
from prism_fast.steps import update
from prism_fast.steps.update import Updater, deepspeed_config
from prism_fast.steps.updater import learning_rate_factor
from tests.oracle import assert_same


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)).to(dtype)


def train(m, updater, steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator).to(dtype)
        m(x).square().mean().backward()
        updater.step()


def test_equals_torch_adamw_with_clipping():
    a, b = model(), model()
    config = OptimizerConfig(lr=1e-2, clip_norm=0.1, weight_decay=0.1)
    updater = Updater(a, config, 10)
    matrices = [p for p in b.parameters() if p.dim() > 1]
    vectors = [p for p in b.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(16, 6, generator=generator)
        a(x).square().mean().backward()
        b(x).square().mean().backward()
        norm = updater.step()
        want = torch.nn.utils.clip_grad_norm_(b.parameters(), 0.1)
        adamw.step()
        adamw.zero_grad()
        assert_same(torch.tensor(norm), want, sum(p.numel() for p in b.parameters()))
    for p, q in zip(a.parameters(), b.parameters()):
        assert_same(p, q, 5 * (16 + 16))  # in a step: the batch's mean, then the functions of AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restores_bit_for_bit(dtype):
    config = OptimizerConfig(lr=1e-2, schedule="cosine", warmup_ratio=0.2)
    whole = model(dtype)
    updater = Updater(whole, config, 8)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(16, 6, generator=generator).to(dtype) for _ in range(8)]

    def run(m, u, xs):
        for x in xs:
            m(x).square().mean().backward()
            u.step()

    run(whole, updater, inputs[:4])
    weights = {k: v.clone() for k, v in whole.state_dict().items()}
    saved = {k: v.clone() for k, v in updater.tensors().items()}
    run(whole, updater, inputs[4:])
    again = model(dtype)
    again.load_state_dict(weights)
    restored = Updater(again, config, 8)
    restored.load(saved, 4)
    run(again, restored, inputs[4:])
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["missing", "shape", "integers", "NaN"])
def test_a_state_that_is_not_its_own_is_refused(change, dtype):
    m = model(dtype)
    updater = Updater(m, OptimizerConfig(lr=1e-2), 8)
    m(torch.ones(2, 6, dtype=dtype)).square().mean().backward()
    updater.step()
    for key in ("exp_avg", "exp_avg_sq", "step", *(["master"] if dtype == torch.bfloat16 else [])):
        name = f"{key}.{updater.names[0]}"
        held = {k: v.clone() for k, v in updater.tensors().items()}
        changed = {"shape": torch.ones(7, 7), "integers": held[name].int(), "NaN": held[name] * float("nan")}
        if change == "missing":
            del held[name]
        elif (key, change) != ("step", "integers"):  # its dtype is AdamW's choice
            held[name] = changed[change]
        else:
            continue
        with pytest.raises(ValueError, match=name):
            Updater(m, OptimizerConfig(lr=1e-2), 8).load(held, 1)


def test_a_gradient_that_is_not_finite_changes_nothing():
    m = model()
    updater = Updater(m, OptimizerConfig(lr=1e-2), 10)
    before = [p.clone() for p in m.parameters()]
    (m(torch.randn(4, 6)).sum() * float("nan")).backward()
    assert math.isnan(updater.step())
    assert updater.step() == 0  # the gradients were cleared
    for a, b in zip(before, m.parameters()):
        assert torch.equal(a, b)


def test_frozen_parameters_stay():
    m = model()
    m[0].requires_grad_(False)
    before = m[0].weight.clone()
    train(m, Updater(m, OptimizerConfig(lr=1e-2), 10), 2)
    assert torch.equal(m[0].weight, before)


def test_schedule():
    config = OptimizerConfig(lr=1.0, schedule="cosine", warmup_ratio=0.1)
    factors = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert 0 < factors[0] < factors[9] < 1 and factors[10] == 1.0
    assert all(a >= b for a, b in pairwise(factors[10:])) and factors[-1] < 1e-3
    assert learning_rate_factor(99, 100, OptimizerConfig(lr=1.0)) == 1.0


def test_order_is_epochs_of_permutations_that_any_position_can_start():
    whole = order(7, 3, 0, 21)
    assert all(sorted(whole[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert whole[:7] != whole[7:14]
    assert [x for start in range(0, 21, 3) for x in order(7, 3, start, 3)] == whole
    assert order(7, 4, 0, 7) != whole[:7]


def test_on_a_gpu_deepspeed_pins_nothing_and_overlaps_where_it_may():
    """Torch would round what it pins up to a power of two: 17.75 GB of masters to 34.4."""
    for form, overlap in (("zero1", False), ("zero2", True), ("zero3", True)):
        made = (ClusterConfig(sharding=form), OptimizerConfig(lr=1e-4, offload=True), torch.bfloat16)
        zero = deepspeed_config(*made, torch.device("cuda", 3), 8)["zero_optimization"]
        assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False} and zero["overlap_comm"] is overlap


def test_deepspeed_is_told_the_gpu_of_this_process(monkeypatch):
    """8 on its machine, of which it sees all, or its own alone; or there is none."""
    world = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    for visible, local_rank in ((8, 5), (1, 0), (0, 5)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert update.local_rank_for_deepspeed() == local_rank
