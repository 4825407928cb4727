"""Memory that runs out in the middle of a step, and packs that are built ahead: neither changes what a step gives."""

import os
import signal
import threading
import time
import traceback

import pytest
import torch
from torch import nn

from prism_fast import metric_names as names
from prism_fast.config import DiscriminatorStep, OptimizerConfig
from prism_fast.models.blocks import ReadOut
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.pack import KIND_RESPONSE, ImageTokens, Tree, pack
from prism_fast.records import DataError, Judgement, Prompt
from prism_fast.steps import updater as updaters
from prism_fast.steps.discriminator_step import discriminator_gradient
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.over_packs import is_out_of_memory, over_packs
from prism_fast.steps.pair_step import pair_gradient, pair_packs
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.sft_step import demonstration_packs, supervised_gradient
from prism_fast.steps.update import Backprop, Updater
from prism_kernels import PolicyObjective
from tests.models import IMAGE_TOKEN, moe, prompt, qwen, tokens
from tests.trainer.steps.test_discriminator_step import batch
from tests.trainer.steps.test_pair_step import records

LIMIT = 1e-12  # of a gradient's norm: sums of float64 in another order
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
IMAGE = ImageTokens(99, 2)


# ---- steps, in float64: each returns what it computes with


def policy():
    return Policy(qwen().double(), forbidden=(IMAGE_TOKEN,)).train()


class ExactDiscriminator(Discriminator):
    """With its head in float64: the trainer's is fp32 whatever the model is."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.double()

    def forward(self, pack, *, balance=False, text_positions=False):
        hidden, stats = self.hidden_states(pack, read=ReadOut(pack.readout, balance))
        return Judgement(hidden @ self.head, stats)


def discriminator():
    return ExactDiscriminator(moe(), torch.randn(32, generator=torch.Generator().manual_seed(0))).train()


def policy_step(objective):
    def run(each, tokens_per_pack):
        _, rollout, _ = batch()
        advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.3, 0.1])
        settings = {"temperature": 0.9, "tokens_per_pack": tokens_per_pack}
        if objective.kl_coef:
            with torch.random.fork_rng():
                settings["reference"] = Backprop(Policy(qwen(seed=3).double()).requires_grad_(False))
        return policy_gradient(each, rollout, advantages, objective, **settings)[0]

    return run


def sft_step(each, tokens_per_pack):
    demonstrations = [(prompt(i % 3, images=((4, 4), (2, 6))), tokens(i, 5 + i)) for i in range(6)]
    return {"loss": supervised_gradient(each, demonstration_packs(demonstrations, tokens_per_pack, each.module))}


def discriminator_step(each, tokens_per_pack):
    lessons, rollout, parts = batch()
    config, load = DiscriminatorStep(length_correction=0.3), ExpertLoad()
    scores, metrics, _ = discriminator_gradient(
        each, lessons, rollout, parts, config, tokens_per_pack=tokens_per_pack, load=load
    )
    return metrics | {f"{k}.{i}": x for k, v in vars(scores).items() for i, x in enumerate(v.double().tolist())}


def pair_step(each, tokens_per_pack, balance=0.1):
    packs, labels = pair_packs(records(), tokens_per_pack, each.module)
    metrics, broken = pair_gradient(each, packs, labels, balance_coef=balance, load=ExpertLoad())
    assert not broken
    return metrics


STEPS = {
    "sft": (policy, sft_step),
    "grpo": (policy, policy_step(PolicyObjective.grpo())),
    "gspo with a reference": (policy, policy_step(PolicyObjective(ratio="sequence", kl_coef=0.1, entropy_coef=0.01))),
    "discriminator": (discriminator, discriminator_step),
    "pairs": (discriminator, pair_step),
}


# ---- where memory runs out, once: (module, number of the pack) -> what undoes it


def raising(number, error=NO_MEMORY):
    """A hook that raises at its ``number``-th call alone."""
    calls = iter(range(1 << 30))

    def hook(*_):
        if next(calls) == number:
            raise error

    return hook


def on_forward(find):
    return lambda model, number: find(model).register_forward_pre_hook(raising(number))


def on_backward(find):
    """As its gradient is made, before it is added."""
    return lambda model, number: find(model).register_hook(raising(number))


PLACES = {
    "forward": on_forward(lambda model: model.text.layers[1]),
    "vision tower": on_forward(lambda model: model.visual.blocks[1]),
    "head": on_forward(lambda model: model.model.lm_head),
    "backward, first gradient": on_backward(lambda model: model.text.norm.weight),
    "backward, middle": on_backward(lambda model: model.text.layers[1].self_attn.q_proj.weight),
    "backward, vision tower": on_backward(lambda model: model.visual.blocks[0].attn.qkv.weight),
}


def gradients(made, run, tokens_per_pack, fail=None, number=0):
    """(metrics, {name: gradient}, updater)."""
    torch.manual_seed(1)
    model = made()
    each = Backprop(model)
    if fail is not None:
        fail(model, number)
    before = torch.get_rng_state()
    metrics = run(each, tokens_per_pack)
    assert torch.equal(torch.get_rng_state(), before)
    return metrics, {name: p.grad for name, p in model.named_parameters()}, each


def assert_same_step(found, expected):
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert found[0][name] == pytest.approx(value, rel=1e-5 if "score" in name else LIMIT, abs=1e-6), name
    for name, want in expected[1].items():
        got = found[1][name]
        assert (got is None) == (want is None), name
        if want is not None:
            error = float((got - want).norm())
            assert error <= LIMIT * float(want.norm()), f"{name}: {error:.1e} of {float(want.norm()):.1e}"


@pytest.fixture(scope="module")
def whole():
    """What steps give in one go, by step and pack size."""
    found = {}

    def of(step, tokens_per_pack):
        if (step, tokens_per_pack) not in found:
            found[step, tokens_per_pack] = gradients(*STEPS[step], tokens_per_pack)
        return found[step, tokens_per_pack]

    return of


CASES = [
    *(("grpo", place) for place in PLACES),
    ("pairs", "forward"),
    *((step, "backward, middle") for step in STEPS if step != "grpo"),
]


@pytest.mark.parametrize(("step", "place"), CASES)
def test_a_pack_that_does_not_fit_goes_in_halves(step, place, whole):
    expected = whole(step, 4096)
    found = gradients(*STEPS[step], 4096, PLACES[place])
    assert found[2].figures()[names.HALVED_PACKS] == 1
    assert expected[2].halved == 0
    assert_same_step(found, expected)


@pytest.mark.parametrize("step", ["grpo", "discriminator"])
@pytest.mark.parametrize("place", ["forward", "backward, middle"])
def test_so_does_a_later_one_and_a_tree_that_is_split(step, place, whole):
    """A tree a pack: its branches go into two, and the first pack's gradients are there already."""
    size = 70 if step == "discriminator" else 80
    expected = whole(step, size)
    found = gradients(*STEPS[step], size, PLACES[place], number=1)
    assert found[2].halved == 1
    assert_same_step(found, expected)


@pytest.mark.parametrize(("step", "options"), [("sft", {}), ("pairs", {"use_reentrant": True})])
def test_activations_that_are_computed_again_change_nothing(step, options, whole):
    """Reentrant: a layer's gradients arrive in a backward within the backward."""
    made, run = STEPS[step]

    def recomputing():
        model = made()
        model.checkpoint_activations(**options)
        return model

    found = gradients(recomputing, run, 4096, PLACES["backward, middle"])
    assert found[2].halved == 1
    assert_same_step(found, whole(step, 4096))


@pytest.mark.parametrize("step", ["sft", "discriminator"])
def test_gradients_that_have_arrived_stay_to_the_bit(step, whole):
    """Of the layers behind the one that failed; nothing but exact zeros is added to them."""
    expected, found = whole(step, 4096), gradients(*STEPS[step], 4096, PLACES["backward, middle"])
    last = [name for name in expected[1] if ".layers.2." in name or name.endswith("language_model.norm.weight")]
    assert last and all(torch.equal(found[1][name], expected[1][name]) for name in last)


@pytest.mark.parametrize("step", STEPS)
def test_memory_may_run_out_behind_the_backward(step, whole, monkeypatch):
    """All gradients have arrived; the second time none does, and what the step measures is there once."""
    expected = whole(step, 4096)
    backward, fail = Backprop.backward, raising(0)

    def then_fail(self, loss):
        backward(self, loss)
        fail()

    monkeypatch.setattr(Backprop, "backward", then_fail)
    found = gradients(*STEPS[step], 4096)
    assert found[2].halved == 1
    assert_same_step(found, expected)
    assert all(torch.equal(found[1][name], want) for name, want in expected[1].items() if want is not None)


def test_dropout_of_halves_leaves_the_generator_alone():
    made = lambda: Discriminator(moe().double(), torch.randn(32), dropout=0.2).train()  # noqa: E731
    states = []
    for fail in (None, PLACES["forward"]):
        torch.manual_seed(1)
        model = made()
        each = Backprop(model)
        if fail is not None:
            fail(model, 0)
        pair_step(each, 4096)
        states.append(torch.get_rng_state())
    assert each.halved == 1 and torch.equal(*states)


# ---- bf16 weights, whose gradients add up in fp32: a module of whole numbers, so that every sum is exact


class Counting(nn.Module):
    """Its gradient is how often each word is predicted, times the label: of two weights, one behind the other."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.low, self.wide = nn.Parameter(torch.ones(100, dtype=torch.bfloat16)), nn.Parameter(torch.ones(100))

    def forward(self, packed):
        rows = self.low[packed.target_ids] * packed.label.repeat_interleave(packed.sequence_start.diff())
        return rows.float().sum() + self.wide[packed.target_ids].sum()


def counting_packs(capacity=25, lengths=((3, 5), (4, 2, 6), (2, 2), (7,))):
    trees = []
    for i, branches in enumerate(lengths):
        ids = torch.arange(3 + sum(branches)) + 11 * i
        parts = ids[3:].split(list(branches))
        trees.append(Tree(Prompt(ids[:3], None, None, bytes([i]), f"a.json:{i}"), parts, [KIND_RESPONSE] * len(parts)))
    return pack(trees, capacity, IMAGE)


def count(each, packs):
    def compute(own):
        loss = each(own.packed)
        each.backward(loss)
        return own.place, own.packed.label.numel()

    return over_packs(each, packs, compute)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("place", ["low", "wide", "fp32 sum"])
def test_sums_in_fp32_survive(place, number, monkeypatch):
    """As one weight's gradient is made, or the other's, or as it is added to its sum in fp32."""
    packs = counting_packs()
    assert len(packs) == 2
    calm = Updater(Counting(), OptimizerConfig(lr=1e-2), 4)
    count(calm, packs)
    fail, take = raising(number), updaters._take

    def failing_take(held):
        if held.grad is not None:
            fail()
        take(held)

    monkeypatch.setattr(updaters, "_take", failing_take if place == "fp32 sum" else take)
    each = Updater(Counting(), OptimizerConfig(lr=1e-2), 4)
    if place != "fp32 sum":
        getattr(each.module, place).register_hook(fail)
    found = count(each, packs)
    assert each.halved == 1 and [at for at, _ in found if len(at) == 2] == [(number, 0), (number, 1)]
    assert sum(branches for _, branches in found) == sum(len(tree.branches) for tree in packs.trees)
    for mine, want in zip(each.parameters, calm.parameters):
        assert torch.equal(updaters.main_grad(mine), updaters.main_grad(want))
    assert each.step() == calm.step()
    assert all(torch.equal(a, b) for a, b in zip(each.parameters, calm.parameters))


def test_no_hooks_stay():
    each = Updater(Counting(), OptimizerConfig(lr=1e-2), 4)
    each.module.low.register_hook(raising(0))
    count(each, counting_packs())
    for parameter in each.parameters:
        own = 1 if parameter is each.module.low else 0
        assert len(parameter._backward_hooks or ()) == own and len(parameter._post_accumulate_grad_hooks or ()) == own


# ---- what cannot be helped


def failing(each, lengths, times=2, capacity=25):
    each.module.low.register_hook(lambda gradient: fails.pop()())
    fails = [lambda: None] * 99 + [raising(0) for _ in range(times)]
    return lambda: count(each, counting_packs(capacity, lengths))


def test_a_half_that_does_not_fit_names_the_setting():
    each = Updater(Counting(), OptimizerConfig(lr=1e-2), 4)
    expected = (
        r"^out of memory \(CUDA out of memory\. Tried to allocate 2\.00 GiB\.\) in half of a pack, 11 of 23 tokens, as "
        r"before in all of it \(.*\); lower run\.tokens_per_pack \(now 25\) to less than 11$"
    )
    with pytest.raises(DataError, match=expected):
        failing(each, ((3, 5), (4, 5)))()


def test_a_pack_that_has_no_halves_names_its_record():
    each = Updater(Counting(), OptimizerConfig(lr=1e-2), 4)
    with pytest.raises(DataError, match=r"a pack of 10 tokens is a\.json:0 with .* cannot be halved; .*remove the rec"):
        failing(each, ((7,),))()


def test_processes_that_go_together_do_not_halve():
    each = Updater(Counting(), OptimizerConfig(lr=1e-2), 4)
    each.lockstep = True
    with pytest.raises(DataError, match=r"none can halve one by itself; lower run\.tokens_per_pack \(now 25\)"):
        failing(each, ((3, 5), (4, 5)))()


def test_what_is_no_lack_of_memory_is_raised_as_it_is():
    each = Updater(Counting(), OptimizerConfig(lr=1e-2), 4)
    each.module.low.register_hook(raising(0, RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        count(each, counting_packs())
    assert each.halved == 0


def test_every_way_to_say_it_is_known():
    with pytest.raises(RuntimeError) as of_the_host:
        torch.empty(1 << 58, dtype=torch.uint8)
    for error in (
        of_the_host.value,
        NO_MEMORY,
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    ):
        assert is_out_of_memory(error), error
    for error in (RuntimeError("out of range"), OSError(2, "none"), DataError("out of memory"), ValueError("memory")):
        assert not is_out_of_memory(error), error


# ---- built ahead


def test_one_pack_is_built_ahead_and_no_more(monkeypatch):
    packs = counting_packs(10, ((3,), (4,), (5,), (6,)))
    assert len(packs) == 4
    build, events = type(packs).__getitem__, []

    def noted(self, index):
        events.append(("begun", index, threading.current_thread() is threading.main_thread()))
        return build(self, index)

    monkeypatch.setattr(type(packs), "__getitem__", noted)
    each = Updater(Counting(), OptimizerConfig(lr=1e-2), 4)

    def compute(own):
        end = time.monotonic() + 5
        while own.number < 3 and ("begun", own.number + 1, False) not in events and time.monotonic() < end:
            time.sleep(0.001)
        events.append(("used", own.number))
        return own.number

    assert over_packs(each, packs, compute) == [0, 1, 2, 3]
    assert [index for what, index, *_ in events if what == "begun"] == [0, 1, 2, 3]
    for number in range(4):
        before = events[: events.index(("used", number))]
        assert max(index for what, index, *_ in before if what == "begun") == min(3, number + 1)
    assert each.figures()[names.HOST_WAIT] >= 0 and each.figures() == {}


def broken_at(number, fail, monkeypatch, packs):
    build = type(packs).__getitem__

    def decode(self, index):
        if index == number:
            fail()
        return build(self, index)

    monkeypatch.setattr(type(packs), "__getitem__", decode)


def test_what_a_build_raises_is_raised_where_its_pack_is_due(monkeypatch):
    packs = counting_packs(10, ((3,), (4,), (5,), (6,)))

    def fail():
        raise DataError("a.json:2: image 1 cannot be read")

    broken_at(2, fail, monkeypatch, packs)
    used = []
    with pytest.raises(DataError, match=r"^a\.json:2: image 1") as caught:
        over_packs(Updater(Counting(), OptimizerConfig(lr=1e-2), 4), packs, lambda own: used.append(own.number))
    assert used == [0, 1]
    assert "decode" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("packs")]


def test_a_build_that_runs_out_of_memory_is_halved_too(monkeypatch):
    packs = counting_packs()
    fail = raising(0)
    broken_at(1, fail, monkeypatch, packs)
    each = Updater(Counting(), OptimizerConfig(lr=1e-2), 4)
    # Building by hand goes past the fault: it is one of the whole pack's.
    assert [place for place, _ in count(each, packs)] == [(0,), (1, 0), (1, 1)]


SMALL = 64 << 10  # bytes: CUDA copies as many to memory of its own before it returns, pinned or not


def test_for_a_gpu_the_thread_pins_and_no_copy_waits(monkeypatch):
    """What torch pins it hands out again only behind the copies out of it (its allocator records an event for each)."""
    gpu, main = torch.device("cuda", 1), threading.main_thread()
    pinned, copies, chosen, real = {}, [], [], torch.Tensor.to

    def pin(tensor):
        if id(tensor) in pinned:
            return tensor
        made = tensor.clone()
        pinned[id(made)] = made, threading.current_thread() is main
        return made

    def to(tensor, *args, **options):
        if torch.device("cuda", 1) not in args:
            return real(tensor, *args, **options)
        copies.append((tensor, options.get("non_blocking", False)))
        return tensor

    class OnGPU(Counting):
        device = gpu

    prompts = [prompt(seed, ((4, 4),)) for seed in range(3)]
    trees = [Tree(each, [tokens(seed, 5)], [KIND_RESPONSE]) for seed, each in enumerate(prompts)]
    packs = pack(trees, max(len(each) for each in prompts) + 5, ImageTokens(IMAGE_TOKEN, 2))
    assert len(packs) == 3
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((device, threading.current_thread())))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    over_packs(Updater(OnGPU(), OptimizerConfig(lr=1e-2), 3), packs, lambda own: own.packed.to(gpu))
    assert [device for device, _ in chosen] == [gpu] * 3 and all(thread is not main for _, thread in chosen)
    assert pinned and not any(in_main for _, in_main in pinned.values())
    assert copies and all(non_blocking for _, non_blocking in copies)
    assert all(id(tensor) in pinned or tensor.nbytes <= SMALL for tensor, _ in copies)
    pixels = [tensor for tensor, _ in copies if tensor.dtype == torch.float32]
    assert len(pixels) == 3 and all(id(tensor) in pinned for tensor in pixels)


@pytest.mark.gpu
def test_pinned_memory_is_not_used_again_before_it_is_copied():
    """Each buffer is given back while its copy waits behind a kernel, and the next of its size is filled at once."""
    copied = []
    torch.cuda._sleep(200_000_000)
    for number in range(20):
        buffer = torch.full((1 << 20,), number).pin_memory()
        copied.append(buffer.to("cuda", non_blocking=True))
        del buffer
    assert [(int(found.min()), int(found.max())) for found in copied] == [(n, n) for n in range(20)]


@pytest.mark.parametrize("where", ["in a build", "in a pack"])
def test_an_interrupt_ends_with_no_thread_left(where, monkeypatch):
    packs = counting_packs(10, ((3,), (4,), (5,), (6,)))

    def interrupt():
        time.sleep(0.05)  # the step waits for its pack by now
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # so that it is at work still

    if where == "in a build":
        broken_at(0, interrupt, monkeypatch, packs)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            over_packs(Updater(Counting(), OptimizerConfig(lr=1e-2), 4), packs, lambda own: interrupt())
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("packs")]
