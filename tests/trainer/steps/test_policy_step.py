"""The policy's step on responses that older weights sampled, against the definition on separate stock forwards."""

import copy
from dataclasses import replace

import pytest
import torch

from prism_fast import metric_names as names
from prism_fast.config import AlignConfig, RLVRConfig, load_config
from prism_fast.models.policy import Policy
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.update import Backprop
from prism_kernels import PolicyObjective
from tests.models import IMAGE_TOKEN, assert_gradients_as_exact, exact, qwen, roundings
from tests.oracle import assert_as_exact, policy_loss
from tests.trainer.steps.test_discriminator_step import batch

TEMPERATURE = 0.8
# Of a token's log-prob to the one that it was sampled with: within every objective's bounds, beyond each, far from all.
DISTANCES = torch.tensor([-0.6, -0.1, 0.0, 0.05, 0.15, 0.5, 3.0], dtype=torch.float64)
OBJECTIVES = {
    "grpo": PolicyObjective.grpo(importance_cap=2.0),
    "dapo": PolicyObjective.dapo(importance_cap=2.0),
    "gspo": PolicyObjective.gspo(importance_cap=2.0),
    "dr_grpo": PolicyObjective.dr_grpo(12, importance_cap=2.0),
    "a small cap": PolicyObjective.grpo(importance_cap=0.5),
    "entropy": PolicyObjective.grpo(importance_cap=2.0, entropy_coef=0.1),
}


def separate(model, rollout):
    """(log-probs, entropies) of every sampled token, a response at a time."""
    found = []
    for ids, group in zip(rollout.response_ids, rollout.group.tolist()):
        root = rollout.prompts[group]
        whole = torch.cat([root.input_ids, ids])[None]
        logits = model(
            input_ids=whole,
            attention_mask=torch.ones_like(whole),
            pixel_values=root.pixel_values,
            image_grid_thw=root.image_grid_thw,
            mm_token_type_ids=(whole == IMAGE_TOKEN).int(),
        ).logits[0, len(root) - 1 : -1]
        full = (logits / TEMPERATURE).log_softmax(-1)
        found.append((full.gather(1, ids[:, None])[:, 0], -(full.exp() * full).sum(-1)))
    return tuple(torch.cat(parts) for parts in zip(*found))


@pytest.mark.parametrize(("name", "tokens_per_pack"), [("grpo", 64), *((name, 4096) for name in OBJECTIVES)])
def test_off_policy_the_sampler_s_log_probs_are_the_old_ones(name, tokens_per_pack):
    objective, stock = OBJECTIVES[name], qwen()
    truth, mine = exact(stock), copy.deepcopy(stock)
    _, rollout, _ = batch()
    lengths = [len(ids) for ids in rollout.response_ids]
    with torch.no_grad():
        now = separate(truth, rollout)[0]
    # More probable than when they were sampled in every other response, less in the others; advantages of both signs.
    towards = torch.tensor([1.0, -1.0] * 4).repeat_interleave(torch.tensor(lengths))
    sampled = (now - towards * DISTANCES[torch.randint(len(DISTANCES), (sum(lengths),))]).float()
    rollout = replace(rollout, logprob=sampled.split(lengths))
    advantages = torch.randn(8).abs() * torch.tensor([1.0, 1.0, -1.0, -1.0] * 2)

    def plain(model):
        starts = torch.tensor([0, *lengths]).cumsum(0)
        logprob, entropy = separate(model, rollout)
        old = sampled.to(logprob.dtype)
        given = (torch.cat(list(rollout.response_ids)), advantages.double(), starts, objective, old, None, old, None)
        loss, seen = policy_loss(logprob, entropy, *given)
        loss.backward()
        return loss, {what: sum(values) / len(values) for what, values in seen.items() if values}

    metrics, _ = policy_gradient(
        Backprop(Policy(mine)),
        rollout,
        advantages,
        objective,
        temperature=TEMPERATURE,
        tokens_per_pack=tokens_per_pack,
        off_policy=True,
    )
    (want, seen), (eager, seen_by_eager) = plain(truth), plain(stock)
    terms = roundings(stock, 150)
    assert_as_exact(torch.tensor(metrics["loss"]), want, eager, terms)
    assert_gradients_as_exact(mine, truth, stock, terms)
    assert seen["weight"] == min(1.0, objective.importance_cap)  # the correction is in the ratio
    for metric, what in ((names.OFF_POLICY_KL, "kl_old"), *((names.OFF_POLICY_CLIPPED[x], x) for x in ("low", "high"))):
        assert seen[what] > 0, what  # or there is nothing to see
        values = (torch.tensor(x) for x in (metrics[metric], seen[what], seen_by_eager[what]))
        assert_as_exact(*values, terms, what)
    assert not any(metric.startswith("sampler_gap") for metric in metrics)  # the distance of the weights is in it


def test_importance_weights_are_capped_where_older_weights_sample():
    """As with an engine; and that older weights do reaches the gradient."""
    missing = {"policy": {"path": "p"}, "data": {"files": "f"}, "run": {"out": "o"}, "steps": 1}
    judged = {"discriminator": {"path": "d"}, "policy_optimizer": {"lr": 1}, "discriminator_optimizer": {"lr": 1}}
    caps = []
    for overlap in (0, 1):
        tree = {**missing, "rollout": {"prompts_per_step": 1, "overlap": overlap, "temperature": 0.7}}
        align = load_config(AlignConfig, None, base={**tree, **judged})
        rewarded = load_config(RLVRConfig, None, base={**tree, "optimizer": {"lr": 1}})
        caps.append(
            (
                align.objective.importance_cap,
                rewarded.objective.build(9, rewarded.rollout.importance_cap).importance_cap,
            )
        )
        assert align.rollout.sampled == {"temperature": 0.7, "off_policy": bool(overlap)}
    assert caps == [(None, None), (2.0, 2.0)]
