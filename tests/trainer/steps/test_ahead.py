"""Batches that are sampled while another trains: of which weights, in which thread, and as a checkpoint has them."""

import threading
from types import SimpleNamespace

import pytest
import torch

from prism_fast import metric_names as names
from prism_fast.config import AlignConfig, ClusterConfig, RLVRConfig, Sampling, load_config
from prism_fast.records import DataError
from prism_fast.steps import sampler as samplers
from prism_fast.steps.ahead import Ahead
from prism_fast.steps.sampler import BuiltinSampler, SnapshotSampler, generate, open_sampler
from prism_fast.steps.sampler_engine import EngineSampler
from prism_fast.steps.update import Backprop
from tests.fake_engine import FakeEngine
from tests.models import prompt
from tests.trainer.steps.test_sampler import Chat, policy

PROMPTS = [prompt(2), prompt(1, images=((4, 4),))]
SAMPLING = Sampling(samples=4, max_response_tokens=8)
STEPS = 5


def moved(module, number):
    """As an update of step ``number`` would leave it."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for value in module.parameters():
            value.mul_(1 + 0.05 * torch.randn(value.shape, generator=generator))


class Run:
    """Steps that train by `moved`. ``overlap`` 1: by a copy of the weights, or with an engine."""

    def __init__(self, overlap=1, steps=STEPS, engine=False, fault=None):
        self.policy, self.said, self.threads = policy(of=30), [], []
        updater = Backprop(self.policy)
        if engine:
            self.sampler = EngineSampler(FakeEngine(self.policy, Chat, fault), updater, Chat, self.said.append)
        else:
            copied = SnapshotSampler(policy(of=30), Chat)
            self.sampler = copied if overlap else BuiltinSampler(updater, Chat)
        config = SimpleNamespace(rollout=SimpleNamespace(overlap=overlap), steps=steps, cluster=ClusterConfig())
        self.ahead = Ahead(self.sampler, Chat, config, self.said.append)
        self.prompts = lambda step: PROMPTS

    def draw(self, step, before):
        self.threads.append(threading.current_thread() is not threading.main_thread())
        assert before is None or before[0] == step - 1
        return step, self.ahead.generate(self.prompts(step), SAMPLING, seed=step)

    def step(self, number):
        drawn, rollout = self.ahead.take(self.draw, number)
        assert drawn == number
        moved(self.policy, number)  # before the next batch is there, where it is sampled meanwhile
        metrics = self.ahead.give(((n, v.detach()) for n, v in self.policy.named_parameters()), number + 1)
        return rollout, metrics


def expected(overlap, steps=STEPS):
    """The batch of every step, from the weights that it should be sampled from."""
    trained, weights = policy(of=30), []
    for step in range(steps):
        weights.append({name: value.detach().clone() for name, value in trained.named_parameters()})
        moved(trained, step)
    batches = []
    for step in range(steps):
        trained.load_state_dict(weights[max(0, step - overlap)], strict=False)
        batches.append(generate(trained, Chat, PROMPTS, SAMPLING, seed=step))
    return batches


def assert_same_batch(got, want):
    assert got.text == want.text and got.tokens_by_rank == want.tokens_by_rank
    assert torch.equal(got.finished, want.finished) and torch.equal(got.group, want.group)
    for name in ("response_ids", "logprob"):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(getattr(got, name), getattr(want, name)))


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_step_s_batch_is_of_the_weights_so_many_steps_older(overlap):
    run = Run(overlap)
    for step, want in enumerate(expected(overlap)):
        rollout, metrics = run.step(step)
        assert_same_batch(rollout, want)
        assert (names.OVERLAP_SECONDS in metrics) == (overlap == 1 and step < STEPS - 1)
    assert run.threads == [False, *[overlap == 1] * (STEPS - 1)]  # and none is sampled that no step trains on
    assert not torch.equal(expected(0)[2].logprob[0], expected(1)[2].logprob[0])  # other weights show


def test_an_engine_is_held_against_the_trainer_while_nothing_trains():
    """At its first call and after the first update; all others run beside a step."""
    run = Run(engine=True)
    for step in range(STEPS):
        run.step(step)
    assert run.threads == [False, True, False, True, True]
    calls = ["generate", "generate", ("update", 1), "generate", ("update", 2), "generate", ("update", 3), "generate"]
    assert run.sampler.engine.calls == [*calls, ("update", 4), "rest", ("update", 5)]


def test_weights_of_another_step_are_refused():
    run = Run()
    run.step(0)
    run.sampler.step = 0  # it was given none
    with pytest.raises(DataError, match="the sampler has weights of step 0, expected those of step 1"):
        run.step(1)
    run = Run()
    run.step(0)
    run.ahead._next.version = -1
    with pytest.raises(
        DataError, match=r"overlap = 1: the batch of step 1, of weights of step -1, came to step 1, exp"
    ):
        run.step(1)
    run = Run(engine=True, fault="old version")
    run.step(0)
    run.step(1)
    with pytest.raises(DataError, match="sampled from weights of version 1, expected those of step 2"):
        run.step(2)


def test_what_goes_wrong_beside_a_step_is_raised_at_its_end():
    run = Run(engine=True)
    run.step(0)
    run.step(1)
    rollout = run.ahead.take(run.draw, 2)[1]
    assert len(rollout) == 8
    run.ahead._thread.join()
    run.sampler.engine.fault = "dead"
    run.ahead.give(((n, v.detach()) for n, v in run.policy.named_parameters()), 3)
    with pytest.raises(DataError, match=r"^engine fake: generate failed .*EngineCore died"):
        run.step(3)
    assert run.threads[-1]  # raised there, told here


def test_a_run_that_ends_early_does_not_wait_for_all_responses(monkeypatch):
    run, begun = Run(), threading.Event()

    def endless(policy, chat, prompts, sampling, *, seed, progress):
        begun.set()
        while True:  # until it is told that nobody waits
            progress(1)

    run.step(0)
    monkeypatch.setattr(samplers, "generate", endless)
    run.ahead.take(run.draw, 1)
    assert begun.wait(60)
    run.ahead.close()
    assert not run.ahead._thread.is_alive()


def test_a_checkpoint_holds_the_responses_that_are_due():
    """The weights that they are of are gone: a resumed run takes the same batches."""
    run = Run()
    for step in range(2):
        run.step(step)
    kept = run.ahead.tensors()
    assert kept.keys() == {
        "version",
        "calls",
        *(f"0.{n}" for n in ("asked", "length", "ids", "logprob", "tokens_by_rank")),
    }

    resumed = Run()
    with torch.no_grad():
        for mine, theirs in zip(resumed.policy.parameters(), run.policy.parameters(), strict=True):
            mine.copy_(theirs)
    resumed.sampler.update(run.policy.named_parameters(), 2)
    resumed.sampler.step = None  # opened with these weights
    resumed.ahead.load(kept, 2)
    for step in range(2, STEPS):
        a, b = run.step(step)[0], resumed.step(step)[0]
        assert_same_batch(a, b)
    assert resumed.said == [] and resumed.ahead.tensors() == {}  # nothing is due after the last step


@pytest.mark.parametrize("asks", ["of other prompts", "once more", "of nothing"])
def test_saved_responses_to_other_prompts_are_not_taken(asks):
    """As of a run that goes on with other data: a draw that asks for others than were saved is made anew."""
    run, resumed = Run(), Run()
    run.step(0)
    resumed.ahead.load(run.ahead.tensors(), 1)

    def draw(step, before):
        asked = {"of other prompts": [PROMPTS[:1]], "once more": [PROMPTS, PROMPTS], "of nothing": []}[asks]
        return [resumed.ahead.generate(prompts, SAMPLING, seed=1) for prompts in asked]

    batch = resumed.ahead.take(draw, 1)
    resumed.ahead.close()
    assert len(resumed.said) == 1 and "are to other prompts than are due now" in resumed.said[0]
    if batch:
        want = generate(run.policy, Chat, batch[0].prompts, SAMPLING, seed=1)
        resumed_from = generate(resumed.policy, Chat, batch[0].prompts, SAMPLING, seed=1)
        assert_same_batch(batch[0], resumed_from)
        assert not torch.equal(want.logprob[0], resumed_from.logprob[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": torch.tensor(0)}, "of weights of step 0, expected 1"),
        ({"calls": torch.tensor(2)}, "1.asked"),
        ({"0.ids": torch.zeros(3, dtype=torch.int32)}, "split"),
        ({"0.logprob": torch.zeros(3)}, "split"),
        ({"0.length": torch.zeros(0, dtype=torch.int64)}, ""),
    ],
)
def test_damaged_responses_are_refused(change, says):
    run = Run()
    run.step(0)
    run.step(1)
    with pytest.raises(ValueError, match=f"^responses of the next step: .*{says}"):
        run.ahead.load({**run.ahead.tensors(), **change}, 2)


def test_a_run_without_overlap_keeps_and_takes_nothing():
    ahead, run = Run().ahead, Run(0)
    run.step(0)
    assert run.ahead.tensors() == {}
    with_overlap = Run()
    with_overlap.step(0)
    run.ahead.load(with_overlap.ahead.tensors(), 1)
    assert_same_batch(run.step(1)[0], expected(0)[1])
    ahead.load({}, 3)  # of a run that began without


def test_a_copy_takes_every_weight():
    run = Run()
    weights = list(run.policy.named_parameters())
    with pytest.raises(RuntimeError, match="1 weights did not come, such as model"):
        run.sampler.update(weights[:-1], 1)
    with pytest.raises(KeyError):
        run.sampler.update([*weights, ("model.other", torch.zeros(1))], 1)


def test_the_built_in_sampler_overlaps_on_a_cpu_alone(tiny_folder):
    from prism_fast.models.load import open_policy

    tree = {"policy": {"path": str(tiny_folder / "base")}, "data": {"files": "f"}, "run": {"out": "o"}, "steps": 1}
    tree |= {"rollout": {"prompts_per_step": 1, "overlap": 1}, "optimizer": {"lr": 1}}
    config = load_config(RLVRConfig, None, base=tree)
    module, chat = open_policy(config.policy)
    opened = open_sampler(config.sampler, Backprop(module), chat)
    assert isinstance(opened, SnapshotSampler) and opened.apart
    mine, theirs = dict(module.named_parameters()), dict(opened.policy.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name] is not theirs[name] for name in mine)
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    with pytest.raises(DataError, match=r"rollout\.overlap = 1: on a GPU .* set rollout\.engine=vllm, or rollout\.ov"):
        open_sampler(config.sampler, Backprop(on_a_gpu), chat)


@pytest.mark.parametrize("value", ["2", "-1", "true", "0.5"])
def test_more_than_a_step_is_refused(value):
    with pytest.raises(DataError, match=r"rollout\.overlap: expected"):
        load_config(AlignConfig, None, [f"rollout.overlap={value}"])
