"""Warnings about a run that goes wrong: when they come, that they come once, and that a resumed run has the same."""

import json
import math

import pytest
import torch

from prism_fast.records import StepStats
from prism_fast.run.alerts import Watch


def feed(watch, name, values, start=1):
    """(step, warning) for every warning that the values of one metric give rise to."""
    found = []
    for step, value in enumerate(values, start):
        found += [(step, text) for text in watch.observe(StepStats(step, {} if value is None else {name: value}))]
    return found


def steps(found):
    return [step for step, _ in found]


def test_watch_entropy():
    watch = Watch(entropy_floor=0.5, patience=3)
    values = [1.0, 1.2, 0.8, 0.6, 0.4, 0.4, 0.6, 0.4, 0.4, 0.4, 0.4, 0.4, 0.7, 0.1, 0.1, 0.1]
    found = feed(watch, "entropy", values)  # early level 1.0
    assert steps(found) == [10, 16]  # three in a row; not again until it has cleared
    assert "entropy collapses: 0.4, for 3 steps below 50% of its early level 1" in found[0][1]
    assert "\n" not in found[0][1]


def test_watch_discriminator_sides_apart():
    watch = Watch(saturation=0.98, patience=2)
    assert feed(watch, "discriminator_accuracy/perception", [0.98, 0.98, 0.98]) == []  # above, not at
    found = feed(watch, "discriminator_accuracy/perception", [1.0, 1.0, 1.0, 0.9, 0.99, 0.99])
    assert steps(found) == [2, 6] and all("saturates on perception" in text for _, text in found)
    both = {"discriminator_accuracy/perception": 1.0, "discriminator_accuracy/reasoning": 1.0}
    assert watch.observe(StepStats(9, both)) == []
    (text,) = watch.observe(StepStats(10, both))
    assert "reasoning" in text


def test_watch_format():
    watch = Watch(format_floor=0.5, format_margin=0.2, patience=2)
    assert steps(feed(watch, "format_valid", [0.4, 0.45, 0.6, 0.9, 0.75, 0.75])) == [2]  # under the floor
    found = feed(watch, "format_valid", [0.65, 0.66, 0.6, 0.71, 0.3, 0.2])  # under the best, 0.9, by the margin
    assert steps(found) == [2, 6] and "below 70.0% (best 90.0%)" in found[0][1]


def test_watch_skips_what_was_not_measured():
    watch = Watch(saturation=0.9, patience=3)
    values = [1.0, None, 1.0, math.nan, None, 1.0]
    assert steps(feed(watch, "discriminator_accuracy/reasoning", values)) == [6]
    assert feed(Watch(patience=1), "loss", [1.0, 2.0]) == []


def test_watch_state_round_trip_at_every_step():
    generator = torch.Generator().manual_seed(3)
    run = [
        StepStats(
            step,
            {
                "entropy": float(torch.rand((), generator=generator)),
                "format_valid": float(torch.rand((), generator=generator)),
                "discriminator_accuracy/perception": float(torch.rand((), generator=generator)),
                "discriminator_accuracy/reasoning": float(torch.rand((), generator=generator)),
            },
        )
        for step in range(1, 61)
    ]
    settings = {"entropy_floor": 0.8, "saturation": 0.4, "format_floor": 0.6, "format_margin": 0.1, "patience": 2}
    whole = Watch(**settings)
    expected = [whole.observe(step) for step in run]
    assert sum(map(len, expected)) > 10
    for cut in range(len(run)):
        first, second = Watch(**settings), Watch(**settings)
        for step in run[:cut]:
            first.observe(step)
        second.load(json.loads(json.dumps(first.state())))
        assert [second.observe(step) for step in run[cut:]] == expected[cut:]
        assert second.state() == whole.state()


@pytest.mark.parametrize(
    "setting", [{"patience": 0}, {"saturation": 1.5}, {"entropy_floor": -1.0}, {"format_margin": 2}]
)
def test_watch_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Watch(**setting)


def test_watch_experts_and_sampler():
    watch = Watch(patience=3)
    shares = {
        f"expert_load/2/{kind}/{e}": share for kind in ("prompt", "image") for e, share in enumerate([0.99, 0.01])
    }
    said = [watch.observe(StepStats(s, {**shares, "sampler_gap/mean": 0.2}, {}, {})) for s in range(1, 6)]
    assert [len(texts) for texts in said] == [0, 0, 2, 0, 0]
    assert said[2][0].startswith("experts collapse in layer 2: for 3 steps, expert 1 got less than 5.0% of all tokens")
    assert said[2][1].startswith("sampler and trainer disagree: 0.2 nats")
    old = {"early_entropy": [], "best_format": None, "held": {"format": 1}}  # of a checkpoint before these rules
    watch.load(old)
    assert watch.state() == old and watch.observe(StepStats(9, shares, {}, {})) == []


def test_a_layer_of_read_tokens_alone_is_no_collapse():
    """Alignment without a balance loss: its last layer computes the last token of every part, and they are alike."""
    even, few = ([0.25] * 4, [0.49, 0.01, 0.01, 0.49])
    read = {"student_caption": few, "teacher_caption": few}
    layers = {0: {"prompt": even, "student_caption": even, "teacher_caption": even}, 1: read}
    metrics = {
        f"expert_load/{layer}/{kind}/{expert}": share
        for layer, kinds in layers.items()
        for kind, shares in kinds.items()
        for expert, share in enumerate(shares)
    }
    watch = Watch(patience=2)
    assert [watch.observe(StepStats(step, metrics)) for step in range(4)] == [[]] * 4
    whole = metrics | {f"expert_load/1/prompt/{expert}": share for expert, share in enumerate(few)}
    said = [line for step in range(4) for line in watch.observe(StepStats(step, whole))]
    assert any("experts collapse in layer 1" in line for line in said)
