"""The probe: by hand, and on discriminators of which it is known what they score by."""

import pytest
import torch
from scipy.stats import spearmanr

from prism_fast.records import Rollout, Sample, Scores
from prism_fast.run.alerts import style_alone
from prism_fast.steps.probe import Side, content_figures, content_metrics, right_parts

RESPONSE = "<caption>{}</caption><think>{}</think><answer>{}</answer>".format


def responses(seed=0, groups=60, samples=8):
    """Parts as an unaligned policy's: two forms, of which the longer is oftener right; lengths vary within a form."""
    draw = torch.Generator().manual_seed(seed)
    count = groups * samples
    form = torch.where(torch.rand(count, generator=draw) < 0.5, 4, 2)
    right = torch.rand(count, generator=draw) < 0.3 + 0.1 * (form == 4)
    length = form * 3 + torch.randint(0, 3, (count,), generator=draw)
    return form, right, length, torch.arange(groups).repeat_interleave(samples), draw


def side(score, kept=...):
    form, right, length, group, draw = responses()
    noise = torch.rand(len(form), generator=draw)
    return Side(score(form, right, length, noise).float(), right, form, length, group)


def test_figures_by_hand():
    """Two groups; a right part that ties, one of another form, one of another length."""
    made = Side(
        score=torch.tensor([2.0, 1.0, 1.0, 3.0, 0.0, 5.0, 4.0]),
        right=torch.tensor([True, False, True, False, False, True, False]),
        form=torch.tensor([4, 4, 4, 2, 4, 1, 1]),
        length=torch.tensor([10, 10, 11, 5, 20, 3, 9]),
        group=torch.tensor([0, 0, 0, 0, 0, 7, 7]),
    )
    found = content_figures(made)
    # Of group 0 the right 2.0 and 1.0 against 1.0, 3.0 and 0.0, of group 7 one pair.
    assert found["pairs"] == 7 and found["auc"] == pytest.approx((1 + 0 + 1 + 0.5 + 0 + 1 + 1) / 7)
    assert found["pairs_form"] == 5 and found["auc_form"] == pytest.approx((1 + 1 + 0.5 + 1 + 1) / 5)
    assert found["pairs_form_length"] == 2 and found["auc_form_length"] == pytest.approx((1 + 0.5) / 2)


def test_the_rank_correlation_of_one_group_is_scipys():
    made = side(lambda form, right, length, noise: length + 4 * noise)
    one = Side(*(values[made.group == 3] for values in made))
    expected = spearmanr(one.score.numpy(), one.length.numpy()).statistic
    assert content_figures(one)["rank_length"] == pytest.approx(expected)


def test_scores_by_length_alone_alert():
    for name in ("perception", "reasoning"):
        found = content_figures(side(lambda form, right, length, noise: length + 0.1 * noise))
        assert found["rank_length"] > 0.9
        alert = style_alone(name, found)
        assert alert is not None and f"{name} scores follow length alone" in alert and "hard negatives" in alert


def test_scores_by_form_alone_alert():
    found = content_figures(side(lambda form, right, length, noise: form + 0.1 * noise))
    assert "follow form alone" in style_alone("perception", found)


@pytest.mark.parametrize("more", [0.0, 0.2, -0.2], ids=["plain", "likes long ones", "likes short ones"])
def test_an_oracle_does_not_alert(more):
    found = content_figures(side(lambda form, right, length, noise: 10.0 * right + more * length + 0.1 * noise))
    assert found["auc"] == found["auc_form"] == found["auc_form_length"] == 1.0 and found["rank_right"] > 0.7
    assert style_alone("perception", found) is None


def test_noise_alone_and_too_few_pairs_do_not_alert():
    assert style_alone("perception", content_figures(side(lambda form, right, length, noise: noise))) is None
    made = side(lambda form, right, length, noise: length + 0.1 * noise)
    few = Side(*(values[:8] for values in made))
    assert style_alone("perception", content_figures(few)) is None
    nothing = made._replace(right=torch.ones_like(made.right))
    found = content_figures(nothing)
    assert "auc" not in found and "rank_right" not in found and style_alone("reasoning", found) is None


@pytest.mark.parametrize(
    ("caption", "think", "answer", "expected"),
    [
        ("3\n-1\n4", "3\n2\n6", "6", (True, True)),
        ("3\n-1", "so", "6", (True, True)),  # another form: what it says is right
        ("3\n1\n4", "3\n2\n6", "6", (False, True)),  # the sign is no bullet
        ("3\n-1\n4\n4", "3\n2\n6", "6", (False, True)),
        ("3\n-1\n4", "3\n3\n6", "6", (True, False)),
        ("3\n-1\n4", "so", "7", (True, False)),
        ("- 3; - -1; - 4", "3; 2; 6", "6", (True, True)),
        ("", "3\n2\n6", "6", (False, True)),
    ],
)
def test_right_parts_by_a_teacher_that_is_right(caption, think, answer, expected):
    truth = {"teacher_caption": "<caption>3\n-1\n4</caption>",
             "teacher_reasoning": "<think>3\n2\n6</think><answer>6</answer>"}  # fmt: skip
    sample = Sample("a:1", (), gold="6", **truth)
    assert right_parts(RESPONSE(caption, think, answer), sample, by_teacher=True) == expected
    assert right_parts(RESPONSE(caption, think, answer), sample, by_teacher=False) == (answer == "6",) * 2
    assert right_parts("no format", sample, by_teacher=True) == (False, False)


def test_a_step_of_alignment_tells_content_from_style():
    text = [RESPONSE("1\n2", "1", a) for a in (1, 2, 1, 2)] + [RESPONSE("1", "1", 1), "no"]
    group = torch.tensor([0, 0, 1, 1, 1, 0])
    rollout = Rollout([], group, [torch.zeros(1)] * 6, [], text, torch.ones(6, dtype=torch.bool))
    score = torch.tensor([2.0, 1.0, 0.0, 3.0, 9.0, 0.0])
    scores = Scores(score, -score, torch.zeros(2), torch.zeros(2), torch.tensor([True] * 5 + [False]))
    parts = [(torch.zeros(n), torch.zeros(3)) for n in (4, 4, 5, 5, 1)] + [None]
    accuracy = torch.tensor([1.0, 0, 1, 0, 1, 0])
    found = content_metrics(rollout, scores, parts, accuracy)
    assert found["content/perception"] == 0.5 and found["content/reasoning"] == pytest.approx((0 + 1 + 0) / 3)
    assert found["style/perception"] > 0.5 and "style/reasoning" not in found  # lengths and steps are all equal
    assert content_metrics(rollout, scores, parts, None) == {}
