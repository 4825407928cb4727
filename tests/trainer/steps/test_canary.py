"""In bf16 an engine is shown another policy before it counts: what it does not follow is caught, and nothing stays."""

import pytest
import torch

from prism_fast.records import DataError
from tests.models import prompt
from tests.trainer.steps.test_sampler_engine import PROMPTS, Trained


class Keeps(Trained):
    """An engine in bf16 that goes on with what it had of weights whose name holds ``kept``."""

    def __init__(self, kept):
        super().__init__(dtype=torch.bfloat16)
        real = self.engine.update
        self.engine.update = lambda weights, step: real([w for w in weights if kept not in w[0]], step)


def copies(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["images", "text"])
def test_a_right_engine_passes_and_everything_is_as_before(prompts):
    made = Trained(dtype=torch.bfloat16)
    before = copies(made.policy)
    made.generate(prompts)
    assert made.engine.calls == ["generate", ("update", 2**31 - 1), "generate", ("update", 0), "generate"]
    assert all(torch.equal(value, before[name]) for name, value in made.policy.named_parameters())
    pushed = copies(made.engine.policy)
    assert all(torch.equal(value, before[name].bfloat16()) for name, value in pushed.items())
    made.generate(prompts)
    assert made.engine.calls[-2:] == ["generate", "generate"]  # once
    made.step(1)
    made.generate(prompts)


def test_in_fp32_the_gap_shows_enough():
    made = Trained()
    made.generate()
    assert made.engine.calls == ["generate"]


@pytest.mark.parametrize("fault", ["stale", "old head", "partly updated"])
def test_an_engine_that_does_not_follow_is_refused_before_a_response_counts(fault):
    made = Trained(fault, torch.bfloat16)
    with pytest.raises(DataError, match=r"^engine fake: it does not become the policy that it is given: .*seen causes"):
        made.generate()
    assert made.engine.calls.count("generate") == 2


@pytest.mark.parametrize("kept", ["embed_tokens", "visual.merger"])
def test_either_half_of_the_change_is_missed(kept):
    made = Keeps(kept)
    half = "head" if kept == "embed_tokens" else "image features"
    with pytest.raises(DataError, match=rf"does not become the policy .* its ({half}) those of before"):
        made.generate()


def test_an_engine_that_forbids_nothing_says_a_forbidden_word():
    made = Trained(dtype=torch.bfloat16)
    made.engine.policy.forbidden = ()
    with pytest.raises(DataError, match="holds a token that the policy may not sample"):
        made.generate([prompt(2)])
