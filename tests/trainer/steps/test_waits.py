"""The host waits for no GPU between a pack's first layer and the last of its backward, and once a step, to read it.

Here on tensors without storage (tests/waits.py); on a GPU torch itself refuses to wait.
"""

import contextlib

import pytest
import torch

from prism_fast.config import DiscriminatorStep
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.steps.discriminator_step import discriminator_gradient
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.pair_step import pair_gradient, pair_packs
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.sft_step import demonstration_packs, supervised_gradient
from prism_fast.steps.update import Backprop
from prism_kernels import PolicyObjective, moe_mlp, moe_route
from tests.models import IMAGE_TOKEN, moe, prompt, qwen, tokens
from tests.trainer.steps.test_discriminator_step import batch
from tests.trainer.steps.test_pair_step import records
from tests.waits import watched

TOKENS = 50  # a pack: several of a batch, so that a wait of each shows
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.0, 0.0])
OBJECTIVES = {
    "grpo": PolicyObjective.grpo(),
    "gspo": PolicyObjective.gspo(),
    "with a reference and entropy": PolicyObjective(kl_coef=0.1, entropy_coef=0.01),
}


class Guarded(Backprop):
    """Counts packs, and runs each from its forward to the end of its backward inside ``guard()``."""

    def __init__(self, module, guard=contextlib.nullcontext):
        super().__init__(module)
        self.guard, self.packs = guard, 0

    def __call__(self, *args, **kwargs):
        self.inside = contextlib.ExitStack()
        self.inside.enter_context(self.guard())
        return super().__call__(*args, **kwargs)

    def backward(self, loss):
        super().backward(loss)
        self.inside.close()
        self.packs += 1


def policy(device, checkpointing=True):
    model = Policy(qwen().to(device).bfloat16(), forbidden=(IMAGE_TOKEN,)).train()
    if checkpointing:
        model.checkpoint_activations()
    return model


def discriminator(device, dropout=0.0):
    return Discriminator(moe().to(device).bfloat16(), torch.randn(32), dropout=dropout).train()


# A step: (device, guard) -> what counts its packs, and what runs it.


def policy_step(device, guard, objective):
    _, rollout, _ = batch()
    updater = Guarded(policy(device), guard)
    settings = {"temperature": 0.9, "tokens_per_pack": TOKENS}
    if objective.kl_coef:
        settings["reference"] = Backprop(policy(device))
    return updater, lambda: policy_gradient(updater, rollout, ADVANTAGES, objective, **settings)


def sft_step(device, guard):
    updater = Guarded(policy(device, checkpointing=False), guard)
    demonstrations = [(prompt(i % 2, images=((4, 4), (2, 6))), tokens(i, 5 + i)) for i in range(6)]
    packs = demonstration_packs(demonstrations, TOKENS, updater.module)
    return updater, lambda: supervised_gradient(updater, packs)


def discriminator_step(device, guard, valid=True):
    lessons, rollout, parts = batch((valid,) * 8)
    updater = Guarded(discriminator(device), guard)
    config = DiscriminatorStep(length_correction=0.3)
    load = ExpertLoad()
    settings = {"tokens_per_pack": TOKENS, "load": load}
    given = (updater, lessons, rollout, parts, config)
    return updater, lambda: (discriminator_gradient(*given, **settings), load.fractions())


def pair_step(device, guard, balance=0.1):
    updater = Guarded(discriminator(device, dropout=0.1), guard)
    updater.module.checkpoint_activations()
    packs, labels = pair_packs(records(), TOKENS, updater.module)
    load = ExpertLoad()
    return updater, lambda: (
        pair_gradient(updater, packs, labels, balance_coef=balance, load=load),
        load.fractions(),
    )


STEPS = {
    **{f"policy, {name}": lambda *given, o=o: policy_step(*given, o) for name, o in OBJECTIVES.items()},
    "sft": sft_step,
    "discriminator": discriminator_step,
    "discriminator, none valid": lambda *given: discriminator_step(*given, valid=False),
    "pairs": pair_step,
    "pairs, no balance": lambda *given: pair_step(*given, balance=0.0),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_once(name, monkeypatch):
    monkeypatch.setenv("PRISM_GROUPED_MM", "triton")  # what is measured on a GPU, there is nothing to measure here
    during = []

    @contextlib.contextmanager
    def guard():
        before = len(waits.found)
        yield
        during.extend(waits.found[before:])

    updater, run = STEPS[name]("meta", guard)
    with watched(monkeypatch) as waits:
        run()
    assert updater.packs > 1
    assert during == []
    assert len(waits.found) == 1, waits.found
    assert "steps/readings.py" in waits.found[0] or name == "sft"


@contextlib.contextmanager
def refusing_to_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_a_gpu_is_not_waited_for(name):
    updater, run = STEPS[name]("cuda", contextlib.nullcontext)
    run()  # compiles, measures, fills caches: once in a process, not once a step
    updater.guard, updater.packs = refusing_to_wait, 0
    run()
    assert updater.packs > 1


def test_waits_are_seen(monkeypatch):
    """Each way to wait that the steps had, and that a GPU knows."""
    host, mask = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    ways = {
        "item": lambda x: float(x.sum()),
        "bool": lambda x: bool(x.any()),
        "tolist": lambda x: x.tolist(),
        "cpu": lambda x: x.cpu(),
        "into the host's": lambda x: torch.zeros(3).copy_(x),
        "to the device": lambda x: host.to("meta"),
        "into the device's": lambda x: x.copy_(host),
        "made there": lambda x: torch.tensor([1.0], device="meta"),
        "rows of a list": lambda x: x[[0, 1]],
        "rows on the host": lambda x: x[torch.tensor([0, 1])],
        "mask": lambda x: x[x > 0],
        "written by a mask": lambda x: x.index_put_((x > 0,), torch.zeros((), device="meta")),
        "nonzero": lambda x: x.nonzero(),
        "equal": lambda x: torch.equal(x, x),
        "repeats": lambda x: x.repeat_interleave(x.long()),
    }
    for name, way in ways.items():
        x = torch.zeros(3, device="meta")
        with watched(monkeypatch) as waits, contextlib.suppress(NotImplementedError, RuntimeError):
            way(x)
        assert len(waits.found) == 1, (name, waits.found)
    with watched(monkeypatch) as waits:
        x = host.to("meta", non_blocking=True) * 2 + torch.tensor(1.0)
        x[:2].masked_fill_(mask[:2].to("meta", non_blocking=True), 1.0)
    assert waits.found == []


def test_bodies_of_operators_are_looked_into(monkeypatch):
    """One product per expert reads where the experts' rows lie."""
    hidden, router, gate_up, down = (
        torch.empty(shape, device="meta") for shape in ((5, 8), (4, 8), (4, 6, 8), (4, 8, 3))
    )
    for backend, reads in (("triton", 0), ("loop", 2)):
        monkeypatch.setenv("PRISM_GROUPED_MM", backend)
        with watched(monkeypatch) as waits:
            moe_mlp(hidden, gate_up, down, moe_route(hidden, router, 2))
        assert len(waits.found) == reads
        assert all("kernels/prism_kernels/moe/grouped_gemm.py" in found for found in waits.found)
