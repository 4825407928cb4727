"""The alignment step against PRISM's definition, computed response by response on separate stock forwards."""

import copy

import pytest
import torch
import torch.nn.functional as F

from prism_fast.config import AdvantageConfig, CompatConfig, DiscriminatorStep
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.pack import Tree
from prism_fast.records import Lesson, Rollout, Sample, Scores
from prism_fast.steps.advantage import alignment_advantage
from prism_fast.steps.discriminator_step import discriminator_gradient, discriminator_trees
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.update import Backprop
from prism_kernels import PolicyObjective
from tests.models import EOS, IMAGE_TOKEN, assert_gradients_as_exact, exact, moe, prompt, qwen, roundings, tokens
from tests.oracle import assert_as_exact, assert_same
from tests.trainer.models.test_discriminator import separate_scores


def batch(valid=(True, True, False, True, True, False, True, True)):
    """Two prompts with four responses each; two equal captions in the first group."""
    lessons = [
        Lesson(Sample("a:1", ()), prompt(1, images=((4, 4),)), (tokens(50, 7), tokens(51, 12))),
        Lesson(Sample("a:2", ()), prompt(2), (tokens(52, 5), tokens(53, 9))),
    ]
    parts = [(tokens(i, 3 + i % 3), tokens(20 + i, 4 + i)) if ok else None for i, ok in enumerate(valid)]
    if parts[0] is not None and parts[1] is not None:
        parts[1] = (parts[0][0], parts[1][1])
    rollout = Rollout(
        prompts=[item.prompt for item in lessons],
        group=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        response_ids=[tokens(70 + i, 5 + i) for i in range(8)],
        logprob=[torch.zeros(5 + i) for i in range(8)],
        text=[""] * 8,
        finished=torch.ones(8, dtype=torch.bool),
    )
    return lessons, rollout, parts


def definition(model, head, lessons, rollout, parts, beta=0.0, clamp=None):
    """PRISM's discriminator loss, one stock forward per response and part, the teacher's repeated for each."""
    total = {"pair": [[], []], "squares": [], "fallback": []}
    for item in lessons:
        plus = separate_scores(model, head, [Tree(item.prompt, item.teacher, ())])
        total["fallback"].append(F.softplus(-plus).sum())
    for i, part in enumerate(parts):
        item = lessons[int(rollout.group[i])]
        plus = separate_scores(model, head, [Tree(item.prompt, item.teacher, ())])
        plus = plus if clamp is None else plus.clamp(-clamp, clamp)
        if part is None:
            total["squares"].append(plus.square().sum())
            continue
        mine = separate_scores(model, head, [Tree(item.prompt, part, ())])
        mine = mine if clamp is None else mine.clamp(-clamp, clamp)
        total["squares"].append(plus.square().sum() + mine.square().sum())
        for side in range(2):
            a = plus[side] - beta * torch.log1p(torch.tensor(float(len(item.teacher[side]))))
            b = mine[side] - beta * torch.log1p(torch.tensor(float(len(part[side]))))
            total["pair"][side].append(F.softplus(b - a))
    loss = 0.001 * torch.stack(total["squares"]).sum() / (4 * len(parts))
    if total["pair"][0]:
        return loss + sum(torch.stack(side).mean() for side in total["pair"])
    return loss + 0.01 * torch.stack(total["fallback"]).mean()


def made(stock, head):
    mine = copy.deepcopy(stock)
    return Discriminator(mine, head)


@pytest.mark.parametrize("tokens_per_pack", [4096, 60])  # 60: every tree is split, its root and teacher repeated
@pytest.mark.parametrize(
    ("valid", "beta"),
    [((True, True, False, True, True, False, True, True), 0.0), ((True,) * 8, 0.3), ((False,) * 8, 0.0)],
)
def test_discriminator_step_equals_the_definition(tokens_per_pack, valid, beta):
    stock, head = moe(), torch.randn(32)
    lessons, rollout, parts = batch(valid)
    mine = made(stock, head)
    config = DiscriminatorStep(length_correction=beta)
    scores, metrics, _ = discriminator_gradient(
        Backprop(mine), lessons, rollout, parts, config, tokens_per_pack=tokens_per_pack, load=ExpertLoad()
    )
    truth, terms = exact(stock), roundings(stock, 100)
    expected = definition(truth, head.double(), lessons, rollout, parts, beta)
    eager = definition(stock, head, lessons, rollout, parts, beta)
    for loss in (expected, eager):
        loss.backward()
    assert_as_exact(torch.tensor(metrics["loss/discriminator"]), expected, eager, terms)
    assert_gradients_as_exact(mine.model, truth, stock, terms, without=("lm_head",))
    for i, part in enumerate(parts):
        item = lessons[int(rollout.group[i])]
        if part is None:
            assert scores.perception[i] == scores.reasoning[i] == 0
            assert not scores.format_valid[i]
            continue
        want, plain = (
            separate_scores(model, head.to(dtype), [Tree(item.prompt, part, ())]).detach()
            - beta * torch.log1p(torch.tensor([float(len(p)) for p in part], dtype=dtype))
            for model, dtype in ((truth, torch.float64), (stock, torch.float32))
        )
        got = torch.stack([scores.perception[i], scores.reasoning[i]])
        assert_as_exact(got, want, plain, terms)
    assert ("discriminator_accuracy/perception" in metrics) == any(valid)  # nothing to measure, nothing reported


def test_compat_clamps_inside_the_loss():
    stock, head = moe(), 30 * torch.randn(32)  # far past +-10
    lessons, rollout, parts = batch()
    config = DiscriminatorStep(compat=CompatConfig(clamp_in_loss=True))
    _, metrics, _ = discriminator_gradient(
        Backprop(made(stock, head)), lessons, rollout, parts, config, tokens_per_pack=4096, load=ExpertLoad()
    )
    expected, eager = (
        definition(model, h, lessons, rollout, parts, clamp=10.0)
        for model, h in ((exact(stock), head.double()), (stock, head))
    )
    assert_as_exact(torch.tensor(metrics["loss/discriminator"]), expected, eager, roundings(stock, 100))


def test_equal_parts_stand_once_and_the_teacher_in_every_part():
    lessons, rollout, parts = batch()
    trees, labels = discriminator_trees(lessons, rollout, parts)
    caption, reasoning = labels.student
    assert caption[0] == caption[1] and reasoning[0] != reasoning[1]  # the shared caption
    assert caption[2] == reasoning[2] == -1
    assert len(trees[0].branches) == 2 + 5
    assert all(tree.together == (0, 1) for tree in trees)
    told = {label: ids for tree in trees for label, ids in zip(tree.labels, tree.branches)}
    assert sorted(told) == list(range(labels.total))
    for i, pair in enumerate(parts):
        assert pair is None or all(torch.equal(told[int(labels.student[side, i])], pair[side]) for side in range(2))
    for i, item in enumerate(lessons):
        assert all(torch.equal(told[int(labels.teacher[side, i])], item.teacher[side]) for side in range(2))


def test_balance_is_added_with_its_coefficient():
    """Its last layer's experts then see all tokens, not the read ones alone, and scores stay what they were."""
    lessons, rollout, parts = batch()
    stock, head = moe(), torch.randn(32)

    def step(coef):
        config, load = DiscriminatorStep(balance_coef=coef), ExpertLoad()
        given = (Backprop(made(stock, head)), lessons, rollout, parts, config)
        scores, metrics, _ = discriminator_gradient(*given, tokens_per_pack=4096, load=load)
        return scores, metrics, load.fractions()

    (plain, without, few), (scores, metrics, all_kinds) = step(0.0), step(0.5)
    assert "loss/balance" not in without and metrics["loss/balance"] > 0
    expected = without["loss/discriminator"] + 0.5 * metrics["loss/balance"]
    assert_same(torch.tensor(metrics["loss/discriminator"]), torch.tensor(expected), roundings(stock, 100))
    assert_same(scores.perception, plain.perception, roundings(stock, 100))
    last = max(int(name.split("/")[1]) for name in all_kinds)
    assert f"expert_load/{last}/prompt/0" in all_kinds and f"expert_load/{last}/prompt/0" not in few


@pytest.mark.parametrize("tokens_per_pack", [4096, 60])
def test_a_part_with_the_teachers_tokens_is_half_right(tokens_per_pack):
    """Its score may differ from the teacher's by rounding, and an accuracy would toss a coin."""
    lessons, rollout, parts = batch()
    valid = [i for i, pair in enumerate(parts) if pair is not None]
    copied = [lessons[int(rollout.group[i])].teacher[0] for i in range(8)]
    parts = [None if pair is None else (copied[i], pair[1]) for i, pair in enumerate(parts)]
    given = (Backprop(made(moe(), torch.randn(32))), lessons, rollout, parts, DiscriminatorStep())
    scores, metrics, _ = discriminator_gradient(*given, tokens_per_pack=tokens_per_pack, load=ExpertLoad())
    assert metrics["discriminator_accuracy/perception"] == 0.5 and metrics["equal_parts/perception"] == 1.0
    better = [bool(scores.teacher_reasoning[rollout.group[i]] > scores.reasoning[i]) for i in valid]
    assert metrics["discriminator_accuracy/reasoning"] == pytest.approx(sum(better) / len(valid))
    assert metrics["equal_parts/reasoning"] == 0.0


def test_advantage_clamps_scores_and_only_there():
    scores = Scores(
        torch.tensor([50.0, 10.0, -3.0]),
        torch.tensor([0.0, 1.0, 2.0]),
        torch.zeros(1),
        torch.zeros(1),
        torch.tensor([True, True, True]),
    )
    got = alignment_advantage(scores, torch.zeros(3, dtype=torch.int64), AdvantageConfig(), DiscriminatorStep())
    difference = torch.tensor(-0.5 / (1 + 1e-6))  # perception ties at the clamp, reasoning differs by one z, and eps
    assert_same(got[0] - got[1], difference, 3 + 16, scale=got.abs().max())


@pytest.mark.parametrize(
    "objective",
    [PolicyObjective.grpo(), PolicyObjective.gspo(), PolicyObjective.dr_grpo(12), PolicyObjective(entropy_coef=0.1)],
)
@pytest.mark.parametrize("tokens_per_pack", [4096, 64])
@pytest.mark.parametrize("without_advantage", [[], [0, 1, 2, 3, 6]])
def test_policy_gradient_equals_separate_forwards(objective, tokens_per_pack, without_advantage):
    stock = qwen()
    mine = copy.deepcopy(stock)
    policy = Policy(mine)
    _, rollout, _ = batch()
    advantages = torch.randn(8)
    advantages[without_advantage] = 0.0
    metrics, computed = policy_gradient(
        Backprop(policy), rollout, advantages, objective, temperature=1.0, tokens_per_pack=tokens_per_pack
    )
    left_out = without_advantage if objective.entropy_coef == 0 else []
    lengths = [len(ids) for ids in rollout.response_ids]

    def plain(model):
        loss = 0.0
        for i, ids in enumerate(rollout.response_ids):
            root = rollout.prompts[int(rollout.group[i])]
            whole = torch.cat([root.input_ids, ids])[None]
            logits = model(
                input_ids=whole,
                attention_mask=torch.ones_like(whole),
                pixel_values=root.pixel_values,
                image_grid_thw=root.image_grid_thw,
                mm_token_type_ids=(whole == IMAGE_TOKEN).int(),
            ).logits[0, len(root) - 1 : -1]
            full = logits.log_softmax(-1)
            logprob = full.gather(1, ids[:, None])[:, 0]
            entropy = -(full.exp() * full).sum(-1)
            row = -(logprob - logprob.detach()).exp() * advantages[i] - objective.entropy_coef * entropy
            weight = {
                "token_mean": 1 / sum(lengths),
                "sequence_mean": 1 / (len(ids) * 8),
                "fixed_length": 1 / (8 * 12),
            }[objective.aggregate]
            loss = loss + row.sum() * weight
        loss.backward()
        return loss.detach()

    truth, terms = exact(stock), roundings(stock, 150)
    expected, eager = plain(truth), plain(stock)
    # A row adds its advantage, or part of the entropy: of size 1, whatever their mean.
    assert_same(torch.tensor(metrics["loss"]), expected, sum(lengths), scale=max(1.0, abs(float(eager))))
    sampled = torch.cat(list(rollout.logprob))
    assert_same(torch.tensor(metrics["entropy"]), -sampled.mean(), len(sampled))
    assert metrics["zero_advantage"] == len(without_advantage) / 8
    assert_gradients_as_exact(policy.model, truth, stock, terms)
    kept = [i for i in range(8) if i not in left_out]
    roots = {int(rollout.group[i]) for i in kept}
    least = sum(lengths[i] for i in kept) + sum(len(rollout.prompts[group]) for group in roots)
    assert computed == least if tokens_per_pack == 4096 else computed >= least


def test_without_any_advantage_nothing_is_computed():
    stock = qwen()
    policy = Policy(stock)
    _, rollout, _ = batch()
    settings = {"temperature": 1.0, "tokens_per_pack": 4096}
    metrics, computed = policy_gradient(Backprop(policy), rollout, torch.zeros(8), PolicyObjective.grpo(), **settings)
    assert (metrics["loss"], metrics["zero_advantage"], computed) == (0.0, 1.0, 0)
    assert not any(name.startswith("sampler_gap") for name in metrics)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_end_of_turn_is_a_trained_token():
    """The branch of a response holds its end-of-turn, and its first token is predicted by the prompt's last."""
    from prism_fast.pack import build_pack

    tree = Tree(prompt(2), [torch.tensor([4, 5, EOS])], [2])
    pack = build_pack([tree], [(0, [0])], Policy(qwen()).image)
    assert pack.target_ids.tolist() == [4, 5, EOS]
    assert pack.predict_row.tolist() == [len(tree.prompt) - 1 + i for i in range(3)]
