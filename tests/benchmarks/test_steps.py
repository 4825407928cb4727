"""The benchmarks of whole steps: all ways agree, wrong ones show no time, FLOPs are counted right, memory is seen."""

import contextlib
import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import main
from benchmarks.harness import processes
from benchmarks.harness.run import Options
from benchmarks.steps import discriminator, discriminator_case, policy, step
from benchmarks.steps.case import GPU, MINI, draw

QUICK = ["--shape", "mini", "--rounds", "1", "--experts", "eager", "--no-memory"]
STEPS = pytest.mark.parametrize(
    ("module", "outputs"),
    [
        (discriminator, {"student", "teacher", "loss", "gradient", "worst parameter"}),
        (policy, {"logprob", "loss", "gradient", "worst parameter"}),
    ],
    ids=["discriminator", "policy"],
)


def case_of(bench, *, checkpointing=False, **changes):
    shape = replace(bench.shapes["mini"], **changes)
    case = bench.build(shape, dtype=torch.float32, device=torch.device("cpu"), checkpointing=checkpointing)
    if shape.experts:
        case.model.set_experts_implementation("eager")
    return case


@pytest.mark.numerical
@STEPS
def test_all_ways_agree_and_the_waterfall_is_printed(module, outputs, tmp_path, capsys):
    files = ["--plot", str(tmp_path / "step.png"), "--json", str(tmp_path / "result.json")]
    assert main([module.BENCH.op, *QUICK, *files]) == 0
    printed = capsys.readouterr().out.splitlines()
    document = json.loads(printed[-1])
    assert document == json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "step.png").stat().st_size > 1000
    (problem,) = document["problems"]
    assert problem["status"] == "ok"
    assert [row["name"] for row in problem["rows"]] == [way.name for way in module.WAYS]
    for row in problem["rows"]:
        assert outputs == row["errors"].keys()
        assert all(error["value"] <= 1e-5 for error in row["errors"].values()), row
        assert row["median_s"] > 0
        assert any(line.startswith(f"  {row['name']} ") for line in printed)
    assert problem["flops"] < problem["reference_flops"] / 2


@pytest.mark.parametrize("part", ["student", "gradient", "worst parameter"])
def test_a_wrong_way_is_refused(monkeypatch, capsys, part):
    ways = discriminator.WAYS
    right = ways[-1].run

    def wrong(case):
        outcome = right(case)
        if part == "student":
            return {**outcome, "student": outcome["student"] * 1.001}
        if part == "worst parameter":  # too small a part of all gradients to show there
            min(step.gradients(case).values(), key=lambda grad: grad.norm()).mul_(1 + 3e-5)
            return outcome
        next(p for p in case.module.parameters() if p.grad is not None).grad.mul_(1.001)
        return outcome

    monkeypatch.setattr(discriminator, "WAYS", (ways[0], replace(ways[-1], run=wrong)))
    assert main(["discriminator", *QUICK]) == 1
    out = capsys.readouterr()
    (problem,) = json.loads(out.out.splitlines()[-1])["problems"]
    assert problem["status"] == "refused"
    assert part in problem["reason"] and (part != "worst parameter" or "gradient" not in problem["reason"])
    assert not any("median_s" in row for row in problem["rows"])
    assert "refused" in out.err


def test_ours_failing_is_no_success(monkeypatch, capsys):
    ways, calls = policy.WAYS, []

    def fails(case):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return ways[-1].run(case)

    monkeypatch.setattr(policy, "WAYS", (ways[0], replace(ways[-1], run=fails)))
    assert main(["policy", *QUICK]) == 1
    (problem,) = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    assert problem["status"] == "refused" and "out of memory" in problem["reason"]


def in_place_addmm(_, a, b, out_shape=None, **kwargs):
    return 2 * a[0] * a[1] * b[1]


def three_products(hidden, weight, *_, out_shape=None, **kwargs):
    return 3 * 2 * hidden[0] * hidden[1] * weight[0]


@STEPS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_equal_the_counted_ones(module, outputs, checkpointing):
    """Lengths are equal within a side, so that torch's attention pads nothing; its math form counts every product."""
    bench = module.BENCH
    case = case_of(bench, checkpointing=checkpointing, caption=40, reasoning=80, responses=2, sigma=0.0)
    expected = bench.flops(case, checkpointing=checkpointing)
    for way, flops in zip(bench.ways(checkpointing), expected, strict=True):
        # What the counter does not know: the experts' weight gradients, and our head, an operator of its own.
        known = {torch.ops.aten.addmm_: in_place_addmm, torch.ops.prism_kernels.linear_policy_loss: three_products}
        counter = FlopCounterMode(display=False, custom_mapping=known)
        with sdpa_kernel(SDPBackend.MATH), counter:
            step.run(case, way)
        assert counter.get_total_flops() == pytest.approx(flops, rel=0.02), way.name


def test_flops_at_the_published_lengths():
    """docs/method.md: about 3,430 TFLOP against 457 with our recompute, 360 without."""
    lengths = [(torch.empty(300), torch.empty(1000))] * 17
    case = SimpleNamespace(shape=GPU, parts=lengths[1:], lesson=SimpleNamespace(teacher=lengths[0]))
    reference, *_, ours, kept = discriminator.flops_of_ways(case, checkpointing=True)
    assert reference == pytest.approx(3430e12, rel=0.02)
    assert ours == pytest.approx(457e12, rel=0.03)
    assert kept == pytest.approx(360e12, rel=0.03)
    assert discriminator.flops_of_ways(case)[-1] == kept


def test_the_reference_encodes_prompt_and_image_96_times():
    case = case_of(discriminator.BENCH, responses=16, caption=2, reasoning=3, prompt=8, grid=(4, 4))
    seen = {"scoring": 0, "update": 0}

    def count(module, arguments, output):
        seen["update" if torch.is_grad_enabled() else "scoring"] += 1

    towers = [case.model.model.visual, case.module.visual]
    with contextlib.ExitStack() as hooks:
        for tower in towers:
            hooks.enter_context(tower.patch_embed.register_forward_hook(count))
        discriminator.reference(case)
        assert seen == {"scoring": 32, "update": 64}
        seen.update(scoring=0, update=0)
        discriminator.ours(case)
        assert seen == {"scoring": 0, "update": 1}


def test_data_with_a_near_tie_of_the_router_is_passed_over(monkeypatch):
    """Two right ways may route such a token differently."""
    margins = iter([1e-9, 1e-9, 0.01])
    bench = replace(discriminator.BENCH, margin=lambda case: next(margins))
    seeds = []
    monkeypatch.setattr(discriminator_case, "draw", lambda shape, seed, draw=discriminator_case.draw: (
        seeds.append(seed), draw(shape, seed))[1])  # fmt: skip
    _, seed = step.without_near_ties(bench, MINI, torch.device("cpu"), False)
    assert seeds == [0, 1, 2] and seed == 2


@STEPS
def test_lengths_are_ragged_first_and_nearly_equal_second(module, outputs):
    bench = module.BENCH
    for ragged, even in (names[:2] for names in bench.default.values()):
        ragged, even = bench.shapes[ragged], bench.shapes[even]
        assert ragged.sigma == 0.45 and replace(ragged, sigma=0.0, spread=even.spread) == even
    parts = {shape: draw(bench.shapes[shape], 0)[1] for shape in ("tiny", "tiny-even")}
    means = (bench.shapes["tiny"].caption, bench.shapes["tiny"].reasoning)
    off = {shape: [abs(len(ids) / mean - 1) for pair in found for ids, mean in zip(pair, means)]
           for shape, found in parts.items()}  # fmt: skip
    assert max(off["tiny-even"]) <= 0.15 < sorted(off["tiny"])[len(off["tiny"]) // 2]


def test_memory_is_measured_on_the_data_that_are_timed(monkeypatch):
    """The data of a later seed, where the first ones have near ties."""
    margins, asked, kept = iter([1e-9, 0.01]), [], []
    bench = replace(discriminator.BENCH, margin=lambda case: next(margins))
    monkeypatch.setattr(processes, "peak_memory", lambda request: (asked.append(request), (2, 1))[1])
    options = Options(device=torch.device("cpu"), rounds=1, experts="eager")
    found = step.problem(bench, "mini", options, kept.append)
    assert found["seed"] == 1 and {request["seed"] for request in asked} == {1}
    case = bench.build(MINI, dtype=torch.float32, device=torch.device("cpu"), seed=1)
    assert found["lengths"] == [len(ids) for ids in case.rollout.response_ids]
    built = []
    timed = replace(bench, build=lambda shape, **given: (built.append((shape, given["seed"])), case)[1])
    timed.memory_call(asked[-1])
    assert built[-1] == (MINI, 1)


def test_an_interrupted_step_keeps_its_rounds(monkeypatch, tmp_path, capsys):
    """Ctrl-C in the third round; agreement, a warm-up and a look at the length have run each way before."""
    ways, calls, path = policy.WAYS, [], tmp_path / "result.json"

    def interrupted(case):
        calls.append(1)
        if len(calls) == 3 + 3:
            signal.raise_signal(signal.SIGINT)
        return ways[-1].run(case)

    monkeypatch.setattr(policy, "WAYS", (ways[0], replace(ways[-1], run=interrupted)))
    words = ["policy", *QUICK, "--json", str(path)]
    words[words.index("--rounds") + 1] = "9"
    assert main(words) == 130
    found = json.loads(path.read_text())
    assert not found["complete"] and found == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["samples"] for row in found["problems"][0]["rows"]] == [2, 2]


def test_peak_memory_on_a_gpu_is_over_weights_without_earlier_gradients(monkeypatch):
    """torch's counters, played: what is allocated is the gradients, and the peak 100 bytes more."""
    case = case_of(policy.BENCH)

    def allocated():
        return 1000 + sum(grad.nbytes for grad in step.gradients(case).values())

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated() + 100)
    row = {}
    for _ in range(2):
        outcome = step.with_peak(case, policy.WAYS[-1], row)
        size = sum(grad.nbytes for grad in step.gradients(case).values())
        outputs = sum(value.untyped_storage().nbytes() for value in outcome.values())
        assert row == {"peak_bytes": size + 100, "output_bytes": size + outputs}


def test_peak_memory_of_a_step_holds_its_gradients():
    request = {"module": policy.__name__, "shape": "mini", "way": "ours (+ fused head)", "dtype": "float32"}
    request |= {"recompute": False, "experts": None, "seed": 0}
    peak, outputs = processes.peak_memory(request)
    case = case_of(policy.BENCH)
    assert peak >= outputs >= sum(p.numel() * 4 for p in case.module.parameters())
