"""The benchmark of the whole discriminator step: all ways agree, wrong ones show no time, FLOPs are counted right."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_discriminator, discriminator_flops, discriminator_ways
from benchmarks.discriminator_case import GPU, MINI, build
from benchmarks.discriminator_ways import WAYS


def mini(**changes):
    case = build(replace(MINI, **changes), dtype=torch.float32, device=torch.device("cpu"))
    case.model.set_experts_implementation("eager")
    return case


def test_all_ways_agree_and_the_waterfall_is_printed(tmp_path, capsys):
    arguments = ["--shape", "mini", "--rounds", "1", "--experts", "eager"]
    arguments += ["--plot", str(tmp_path / "waterfall.png"), "--json", str(tmp_path / "result.json")]
    assert bench_discriminator.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    document = json.loads(printed[-1])
    assert document == json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "waterfall.png").stat().st_size > 1000
    (problem,) = document["problems"]
    assert problem["status"] == "ok"
    assert [row["name"] for row in problem["rows"]] == [way.name for way in WAYS]
    for row in problem["rows"]:
        assert {"student", "teacher", "loss", "gradient"} == row["errors"].keys()
        assert all(error["value"] <= 1e-5 for error in row["errors"].values()), row
        assert row["median_s"] > 0
        assert any(line.startswith(f"  {row['name']} ") for line in printed)
    assert problem["flops"] < problem["reference_flops"] / 5


@pytest.mark.parametrize("part", ["student", "gradient"])
def test_a_wrong_way_is_refused(monkeypatch, capsys, part):
    right = WAYS[-1].run

    def wrong(case):
        outcome = right(case)
        if part == "student":
            return replace(outcome, student=outcome.student * 1.001)
        next(p for p in case.discriminator.parameters() if p.grad is not None).grad.mul_(1.001)
        return outcome

    monkeypatch.setattr(discriminator_ways, "WAYS", (WAYS[0], replace(WAYS[-1], run=wrong)))
    assert bench_discriminator.main(["--shape", "mini", "--rounds", "1", "--experts", "eager"]) == 1
    out = capsys.readouterr()
    (problem,) = json.loads(out.out.splitlines()[-1])["problems"]
    assert problem["status"] == "refused"
    assert part in problem["reason"]
    assert not any("median_s" in row for row in problem["rows"])
    assert "refused" in out.err


def in_place_addmm(_, a, b, out_shape=None, **kwargs):
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_equal_the_counted_ones(checkpointing):
    """Lengths are equal within a side, so that torch's attention pads nothing; its math form counts every product."""
    shape = replace(MINI, caption=40, reasoning=80, responses=2, spread=0.0)
    case = build(shape, dtype=torch.float32, device=torch.device("cpu"), checkpointing=checkpointing)
    case.model.set_experts_implementation("eager")
    expected = discriminator_flops.flops_of_ways(case, checkpointing=checkpointing)
    for way, flops in zip(discriminator_ways.ways(checkpointing), expected, strict=True):
        # One product that the counter does not know: addmm_, of the experts' weight gradients.
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_addmm})
        with sdpa_kernel(SDPBackend.MATH), counter:
            bench_discriminator.run(case, way)
        assert counter.get_total_flops() == pytest.approx(flops, rel=0.02), way.name


def test_flops_at_the_published_lengths():
    """docs/method.md: about 3,430 TFLOP against 480 with the same recompute, 360 without."""
    lengths = [(torch.empty(300), torch.empty(1000))] * 17
    case = type("Lengths", (), {"shape": GPU, "parts": lengths[1:], "lesson": type("L", (), {"teacher": lengths[0]})})
    reference, *_, ours, kept = discriminator_flops.flops_of_ways(case, checkpointing=True)
    assert reference == pytest.approx(3430e12, rel=0.02)
    assert ours == pytest.approx(480e12, rel=0.03)
    assert kept == pytest.approx(360e12, rel=0.03)
    assert discriminator_flops.flops_of_ways(case)[-1] == kept


def test_the_reference_encodes_prompt_and_image_96_times(monkeypatch):
    case = mini(responses=16, caption=2, reasoning=3, prompt=8, grid=(4, 4))
    seen = {"scoring": 0, "update": 0}

    def count(module, arguments, output):
        seen["update" if torch.is_grad_enabled() else "scoring"] += 1

    with case.model.model.visual.patch_embed.register_forward_hook(count):
        discriminator_ways.reference(case)
        assert seen == {"scoring": 32, "update": 64}
        seen.update(scoring=0, update=0)
        discriminator_ways.ours(case)
        assert seen == {"scoring": 0, "update": 1}
