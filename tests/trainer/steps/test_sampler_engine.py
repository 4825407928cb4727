"""An engine behind the seam: its answers are the trainer's, and every silent fault known of one is caught."""

import pytest
import torch

from prism_fast.config import Sampling
from prism_fast.records import DataError
from prism_fast.steps import sampler_engine
from prism_fast.steps.sampler import BuiltinSampler
from prism_fast.steps.sampler_engine import EngineSampler, log_prob_gap
from prism_fast.steps.sampler_shares import Response
from prism_fast.steps.update import Backprop
from tests.fake_engine import FAULTS, FakeEngine
from tests.models import VOCAB, prompt
from tests.trainer.steps.test_sampler import Chat, policy

PROMPTS = [prompt(2), prompt(1, images=((4, 4),))]
SAMPLING = Sampling(samples=4, max_response_tokens=12, temperature=0.9)
AFTER_AN_UPDATE = ("stale", "partly updated", "old head", "old version", "dies in a push")


class Trained:
    """A policy that an engine has a copy of, and the weights of its steps."""

    def __init__(self, fault=None, dtype=torch.float32):
        self.policy, self.said = policy(of=30), []
        self.engine = FakeEngine(self.policy, Chat, fault, dtype)
        self.sampler = EngineSampler(self.engine, Backprop(self.policy), Chat, self.said.append)

    def generate(self, prompts=PROMPTS, seed=3, **kwargs):
        return self.sampler.generate(prompts, SAMPLING, seed=seed, **kwargs)

    def step(self, number):
        """Every weight moves by 5 %, and the engine is told."""
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for value in self.policy.parameters():
                value.mul_(1 + 0.05 * torch.randn(value.shape, generator=generator))
        stream = ((name, value.detach()) for name, value in self.policy.named_parameters())
        self.sampler.update(stream, number)
        assert next(stream, None) is None  # taken to its end, as other processes do


def test_an_engine_samples_from_the_weights_that_it_was_given_last():
    made = Trained()
    for number in (1, 2, 3):
        rollout = made.generate(seed=number)
        assert rollout.group.tolist() == [0] * 4 + [1] * 4 and len(rollout.text) == 8
        for group in range(2):
            found = [Response(rollout.response_ids[i], rollout.logprob[i]) for i in range(4 * group, 4 * group + 4)]
            gap = log_prob_gap(made.policy, PROMPTS[group], found, SAMPLING.temperature)
            assert len(gap) == sum(len(r.ids) for r in found) and float(gap.max()) < 1e-4
        made.step(number)
    assert made.engine.calls == ["generate", ("update", 1), "generate", ("update", 2), "generate", ("update", 3)]
    assert made.said == [] and made.policy.training


@pytest.mark.parametrize("fault", FAULTS)
def test_what_engines_do_wrong_in_silence_stops_the_run(fault):
    made = Trained(fault)
    with pytest.raises(DataError, match=f"^engine fake: .*{FAULTS[fault]}") as stopped:
        made.generate([prompt(2)] * 2 if fault == "one seed" else PROMPTS)
        assert fault in AFTER_AN_UPDATE
        made.step(2)
        made.generate(seed=4)
    assert "\n" not in str(stopped.value)


def test_the_group_that_is_computed_again_has_an_image_where_there_is_one(monkeypatch):
    """Only there do pixels show."""
    seen = []
    real = sampler_engine.log_prob_gap
    monkeypatch.setattr(
        sampler_engine, "log_prob_gap", lambda p, prompt, *rest: seen.append(prompt) or real(p, prompt, *rest)
    )
    made = Trained()
    made.generate()
    made.generate()  # checked once
    made.step(1)
    made.generate()  # and once again
    made.step(2)
    made.generate()
    assert [each is PROMPTS[1] for each in seen] == [True, True]


@pytest.mark.parametrize(("shift", "said"), [(0.0, 0), (0.02, 1)])
def test_in_bf16_rounding_passes_and_more_than_rounding_is_told(shift, said):
    made = Trained(dtype=torch.bfloat16)
    made.engine._damaged = lambda number, response: Response(response.ids, response.logprob - shift)
    made.generate()
    assert len(made.said) == said
    assert all(line.startswith("engine fake: log-probs differ by 0.0") for line in made.said)
    made.engine._damaged = lambda number, response: Response(response.ids, response.logprob - 0.2)
    made.step(1)
    with pytest.raises(DataError, match=r"expected 0\.1 or less"):
        made.generate()


def test_a_gap_is_of_the_first_tokens_of_a_group():
    made = Trained()
    rollout = made.generate()
    found = [Response(ids, logprob + i) for i, (ids, logprob) in enumerate(zip(rollout.response_ids, rollout.logprob))]
    lengths = [len(r.ids) for r in found[:4]]
    gap = log_prob_gap(made.policy, PROMPTS[0], found[:4], SAMPLING.temperature, tokens=lengths[0] + 1)
    assert len(gap) == lengths[0] + 1
    assert float(gap[:-1].max()) < 1e-4 < 0.99 < float(gap[-1])


def test_equal_responses_are_no_fault_where_they_are_likely():
    """A policy that has come to say one thing says it again and again."""
    made = Trained()
    for each in (made.policy, made.engine.policy):
        each.forbidden = tuple(word for word in range(VOCAB) if word != 5)
    rollout = made.generate([prompt(2)] * 3)
    assert set(rollout.text) == {" ".join(["5"] * 12)}


def test_seeds_are_spaced_by_the_number_of_samples_and_steps_are_far_apart():
    made, seen = Trained(), []
    real = made.engine.generate
    made.engine.generate = lambda requests, *rest: seen.extend(r.seed for r in requests) or real(requests, *rest)
    made.generate(seed=5)
    made.generate(seed=6)
    assert seen[1] - seen[0] == seen[3] - seen[2] == SAMPLING.samples
    assert abs(seen[2] - seen[0]) > 2**40 and all(0 <= seed < 2**62 for seed in seen)


def test_progress_rest_and_close_reach_the_engine():
    made, done = Trained(), []
    made.generate(progress=done.append)
    made.sampler.rest()
    made.sampler.close()
    assert done == [8] and made.engine.calls == ["generate", "rest", "close"]


def test_the_built_in_sampler_takes_nothing_from_the_stream():
    sampler = BuiltinSampler(Backprop(policy()), Chat)
    sampler.update((pytest.fail("taken") for _ in range(1)), 1)
    sampler.rest()
    sampler.close()
    assert len(sampler.generate([prompt(2)], SAMPLING, seed=1)) == 4
