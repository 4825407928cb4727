"""Sampling: log-probs agree with the trainer's, groups share a prefill, forbidden tokens never come, rows leave."""

import copy

import pytest
import torch

import prism_fast.steps.sampler_builtin as rollout_module
from prism_fast.config import Sampling
from prism_fast.models.policy import Policy
from prism_fast.pack import KIND_RESPONSE, Tree, build_pack
from prism_fast.steps.sampler_builtin import draw, generate
from tests.models import EOS, IMAGE_TOKEN, PAD, VISION_END, VISION_START, prompt, qwen, roundings
from tests.oracle import assert_as_exact, assert_same

FORBIDDEN = (IMAGE_TOKEN, VISION_START, VISION_END, PAD, 95)


class Chat:
    end_of_turn_id = EOS

    @staticmethod
    def decode(ids):
        return " ".join(map(str, ids.tolist()))


def sampling(samples, max_tokens, temperature=1.0, rows_at_once=512):
    return Sampling(samples=samples, max_response_tokens=max_tokens, temperature=temperature, rows_at_once=rows_at_once)


def policy(eos_bias=0.0):
    model = copy.deepcopy(qwen())
    made = Policy(model, forbidden=FORBIDDEN)
    made.bias[EOS] += eos_bias
    return made


def trainer_logprobs(p, rollout, temperature):
    trees = [
        Tree(prompt_, [ids for ids, g in zip(rollout.response_ids, rollout.group) if g == i], [KIND_RESPONSE] * 99)
        for i, prompt_ in enumerate(rollout.prompts)
    ]
    pack = build_pack(trees, [(i, range(len(t.branches))) for i, t in enumerate(trees)], p.image)
    logits = (p(pack)[pack.predict_row] @ p.head.T + p.bias) / temperature
    return logits.log_softmax(-1).gather(1, pack.target_ids[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_log_probs_agree(temperature):
    p = policy(eos_bias=2.0)
    prompts = [prompt(1, images=((4, 4),)), prompt(2), prompt(3, images=((2, 8), (4, 4)))]
    rollout = generate(p, Chat, prompts, sampling(5, 70, temperature), seed=3)
    assert len(rollout) == 15
    lengths = [len(x) for x in rollout.response_ids]
    assert max(lengths) > 1  # and the rows do not all stop at once
    assert len(set(lengths)) > 2
    got = torch.cat(list(rollout.logprob))
    with torch.no_grad():
        eager, truth = (trainer_logprobs(each, rollout, temperature) for each in (p, copy.deepcopy(p).double()))
    assert_as_exact(got, truth, eager, roundings(p.model, 300))


def test_forbidden_tokens_are_never_sampled_and_rows_stop_at_end_of_turn():
    p = policy()
    rollout = generate(p, Chat, [prompt(2)] * 3, sampling(40, 12), seed=0)
    sampled = torch.cat(list(rollout.response_ids))
    assert not torch.isin(sampled, torch.tensor(FORBIDDEN)).any()
    for ids, finished in zip(rollout.response_ids, rollout.finished):
        assert bool(finished) == (int(ids[-1]) == EOS)
        assert not (ids[:-1] == EOS).any()
        assert finished or len(ids) == 12


def test_logits_come_in_blocks(monkeypatch):
    p = policy(eos_bias=1.0)
    shapes, product = [], rollout_module._product
    monkeypatch.setattr(rollout_module, "_product", lambda x, head: shapes.append(len(x)) or product(x, head))
    whole = generate(p, Chat, [prompt(2)], sampling(7, 9), seed=7)
    assert shapes[0] == 7
    monkeypatch.setitem(rollout_module.LOGITS, "cpu", 3 * p.head.shape[0])
    shapes.clear()
    assert generate(p, Chat, [prompt(2)], sampling(7, 9), seed=7).text == whole.text
    assert shapes[:3] == [3, 3, 1] and max(shapes) == 3


def test_responses_do_not_depend_on_the_batch():
    p = policy(eos_bias=1.0)
    prompts = [prompt(1, images=((4, 4),)), prompt(2), prompt(4)]
    whole = generate(p, Chat, prompts, sampling(3, 20), seed=7)
    small = generate(p, Chat, prompts, sampling(3, 20, rows_at_once=3), seed=7)
    assert whole.text == small.text
    assert whole.text != generate(p, Chat, prompts, sampling(3, 20), seed=8).text


def test_greedy_is_the_argmax_of_the_full_forward():
    p = policy()
    rollout = generate(p, Chat, [prompt(1, images=((4, 4),))], sampling(1, 6, 0.0), seed=0)
    pack = build_pack([Tree(rollout.prompts[0], rollout.response_ids, [2])], [(0, [0])], p.image)
    with torch.no_grad():
        best = (p(pack)[pack.predict_row] @ p.head.T + p.bias).argmax(-1)
    assert torch.equal(best, rollout.response_ids[0])


def test_draw_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, -1e9, 2.0]).expand(20000, 4)
    token, logprob = draw(logits, torch.rand(20000, generator=torch.Generator().manual_seed(0)), 1.0)
    expected = logits[0].softmax(-1)
    frequency = torch.bincount(token, minlength=4) / 20000
    assert frequency[2] == 0
    assert (frequency - expected).abs().max() < 4.5 * (0.25 / 20000) ** 0.5  # standard deviations of a share, at most
    assert_same(logprob, expected.log()[token], 4 + 4)
    edge, _ = draw(torch.zeros(2, 4), torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64), 1.0)
    assert edge.tolist() == [0, 3]
