"""The benchmark of whole steps by their parts, at toy size: what it works on, what it tells, and when."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.harness import document, table
from benchmarks.harness.measure import Timer
from benchmarks.harness.run import Options
from benchmarks.report import results
from benchmarks.steps import flops, stage_case, stages
from prism_fast.response_format import split_parts

CPU = torch.device("cpu")
MINI = stages.LOADS["mini"]
OPTIONS = Options(device=CPU, rounds=1)


def test_every_stage_tells_its_parts(tmp_path):
    path = tmp_path / "step.json"
    assert main(["step", "--dry-run", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    document.validate(found)
    assert [problem["name"] for problem in found["problems"]] == list(stages.STAGES)
    for problem in found["problems"]:
        whole, *rows = problem["rows"]
        assert [row["name"] for row in rows] == list(stages.PARTS[problem["name"]])
        assert set(problem["first"]) == set(stages.PARTS[problem["name"]])
        assert whole["share"] == 1 and math.isclose(sum(row["share"] for row in rows), 1)
        by_name = {row["name"]: row for row in rows}
        assert by_name["update"]["tokens"] > 0 and by_name["update"]["tflops"] > 0 and "tokens" not in by_name["host"]
        assert problem["flops"] > 0 and "float32 moments" in "\n".join(table.lines(problem, {}))
    page = results.render([found])
    assert "### step" in page and "| rollout |" in page and "| optimizer |" in page


def test_what_is_known_is_told_part_by_part(monkeypatch):
    """A step that is cut off in its second part leaves the first one's seconds."""
    kept = []

    def cut(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "rewards_of", cut)
    with pytest.raises(KeyboardInterrupt):
        stages.measured("rlvr", "mini", OPTIONS, lambda result: kept.append(dict(result["first"])))
    assert [list(first) for first in kept] == [["host"], ["host", "rollout"]]


def test_a_step_whose_loss_is_not_finite_shows_no_speed(monkeypatch):
    whole = stages.policy_gradient
    calls = []

    def broken(*given, **named):
        metrics, tokens = whole(*given, **named)
        calls.append(1)
        return ({**metrics, "loss": math.nan} if len(calls) > 1 else metrics), tokens

    monkeypatch.setattr(stages, "policy_gradient", broken)
    found = stages.measured("rlvr", "mini", OPTIONS, lambda result: None)
    assert found["status"] == "refused" and "loss is nan" in found["reason"]
    assert found["first"] and not any("median_s" in row for row in found["rows"])


def test_records_have_the_lengths_that_are_asked_for():
    load = stages.LOADS["tiny"]
    chat = stage_case.make_chat(load)
    assert 0 <= load.policy.vocab - chat.vocab_size < load.policy.vocab // 100
    for sample in stage_case.make_samples(load, chat):
        prompt = chat.encode_prompt(sample)
        assert len(prompt) == load.policy.prompt and tuple(prompt.image_grid_thw[0]) == (1, *load.policy.grid)
    for tokens in (30, 210, 1000):
        text = stage_case.text_of(tokens, "7")
        parts = split_parts(text)
        assert parts is not None and parts.answer == "7"
        assert tokens <= len(chat.encode_part(text)) <= tokens + 12  # and its tags


def test_responses_end_after_the_mean_length():
    """The end of turn has 1 / mean at the positions that were looked at, and a rollout is ragged."""
    stage, _ = stages.open_stage("rlvr", MINI, OPTIONS)
    sampling = stage.sampling(1).model_copy(update={"samples": 64, "max_response_tokens": 10 * MINI.mean})
    prompts = [stage.chat.encode_prompt(stage.samples[0])]
    rollout = stage.sampler.generate(prompts, sampling, seed=0)
    lengths = [len(ids) for ids in rollout.response_ids]
    assert MINI.mean / 3 < sum(lengths) / len(lengths) < 3 * MINI.mean and len(set(lengths)) > 10
    assert all(split_parts(text) is not None for text in rollout.text)
    gpu = stages.LOADS["gpu"]
    assert stages.Stage(gpu, [], None, None, None, None, True).sampling(0).max_response_tokens == 256 < gpu.longest


@pytest.mark.parametrize("name", stages.STAGES)
def test_operations_are_those_of_the_tokens_that_are_computed(monkeypatch, name):
    """Every tree whose operations are counted has the tokens that went through the model; none is split here."""
    counted, whole = [], flops.tree

    def tree(shape, branches, **options):
        counted.append((shape.experts, shape.prompt + sum(branches)))
        return whole(shape, branches, **options)

    monkeypatch.setattr(flops, "tree", tree)
    load = replace(MINI, tokens_per_pack=4096)
    stage, _ = stages.open_stage(name, load, OPTIONS)
    work, tokens = stages.STAGES[name](stage, stages.Clock(Timer(CPU)), 1)
    experts = load.judge.experts
    assert tokens["update"] == sum(total for known, total in counted if known == 0)
    assert tokens.get("score", 0) == sum(total for known, total in counted if known == experts)
    assert all(value > 0 for value in work.values())


@pytest.mark.parametrize(
    ("memory", "parameters", "way"),
    [
        (141e9, [4.4e9], (False, False, False)),  # 71 GB
        (80e9, [4.4e9], (True, False, False)),  # 53
        (150e9, [4.4e9, 5.9e9], (True, False, False)),  # 124
        (120e9, [4.4e9, 5.9e9], (True, True, False)),  # 88
        (80e9, [4.4e9, 5.9e9], (True, True, True)),  # 62
        (10e9, [4.4e9], (True, True, True)),
    ],
)
def test_the_optimizer_goes_where_there_is_room(monkeypatch, memory, parameters, way):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert stages.way_to_hold(parameters, Options(device=torch.device("cuda"))) == way
