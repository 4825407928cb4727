"""Whole stages with an engine that samples for them, and what happens where it cannot."""

import importlib

import pytest

from prism_fast import metric_names as names
from prism_fast.config import CONFIGS, AlignConfig, FilterConfig, load_config
from prism_fast.records import DataError
from prism_fast.run import checkpoint
from prism_fast.run.monitor import read_metrics
from prism_fast.stages.prepare import filter_prompts
from prism_fast.steps.sampler_engine import EngineSampler
from tests.fake_engine import FakeEngine
from tests.tiny_run import run_stage, settings

pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.fixture
def engines(monkeypatch):
    """Engines that stages open from now on; ``engines.fault`` is what the next does wrong."""

    class Opened(list):
        fault = None

        def open(self, start, updater, chat, saved=None, say=print):
            self.append(FakeEngine(updater.module, chat, self.fault))
            return EngineSampler(self[-1], updater, chat, say)

    opened = Opened()
    for stage in ("align", "rlvr", "answers"):
        monkeypatch.setattr(importlib.import_module(f"prism_fast.stages.{stage}"), "open_sampler", opened.open)
    return opened


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_a_stage_trains_on_what_an_engine_samples(stage, tiny_folder, tmp_path, engines):
    tree = settings(tiny_folder, stage, tmp_path / "run", steps=4)
    tree |= {"objective": {"entropy_coef": 0.01}} if stage == "rlvr" else {}  # no response has a reward
    run_stage(stage, tree)
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if names.TOKENS_PER_SECOND in line]
    gaps = [line[names.SAMPLER_GAP_MAX] for line in lines if names.SAMPLER_GAP_MAX in line]
    assert len(lines) == 4 and gaps and max(gaps) < 1e-4  # stale weights would be 1e-2 off after one update
    (engine,) = engines
    pushed = [call[1] for call in engine.calls if isinstance(call, tuple)]
    assert pushed == [1, 2, 3, 4] and engine.calls[-1] == "close"
    assert engine.calls[:2] == ["generate", "rest"] and engine.calls.count("rest") == 4
    # An evaluation, at step 4 alone, is by the engine too, with the weights of that step.
    assert engine.calls.count("generate") == 4 + ("eval_files" in tree["data"])


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_an_engine_samples_the_next_batch_while_a_step_trains(stage, tiny_folder, tmp_path, engines):
    tree = settings(tiny_folder, stage, tmp_path / "run", steps=4)
    tree["rollout"] = {**tree["rollout"], "overlap": 1}
    run_stage(stage, tree)
    (engine,) = engines
    # The first update is checked with the trainer at rest, so its batch comes before that step trains.
    calls = ["generate", "generate", ("update", 1), "generate", ("update", 2), "generate", ("update", 3), "rest"]
    evaluation = ["generate"] * ("eval_files" in tree["data"])
    assert engine.calls == [*calls, ("update", 4), *evaluation, "close"]
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if names.TOKENS_PER_SECOND in line]
    assert [names.OVERLAP_SECONDS in line for line in lines] == [True, False, True, False]


def test_an_engine_that_dies_ends_the_run_in_one_line_and_it_is_resumed(tiny_folder, tmp_path, engines):
    engines.fault = "dies in a push"
    with pytest.raises(
        DataError, match=r"^engine fake: update failed \(RuntimeError: EngineCore died\).*--resume"
    ) as e:
        run_stage("align", settings(tiny_folder, "align", tmp_path / "run", steps=3))
    assert "\n" not in str(e.value) and engines[0].calls[-1] == "close"
    engines.fault = None
    run_stage("align", settings(tiny_folder, "align", tmp_path / "run", steps=3), resume=True)
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1] == 3


def test_prompts_are_filtered_by_an_engine_s_responses(tiny_folder, tmp_path, engines):
    tree = {"model": {"path": str(tiny_folder / "base")}, "out": str(tmp_path / "kept.parquet"), "samples": 2}
    tree |= {"data": {"files": [str(tiny_folder / "data/rlvr.parquet")]}, "max_response_tokens": 3, "low": 0.0}
    assert filter_prompts(load_config(FilterConfig, None, base=tree))["kept"] == 12
    assert engines[0].calls == ["generate", "close"]
    engines.fault = "fewer responses"
    with pytest.raises(DataError, match="gave 1 responses of 2; none was used"):
        filter_prompts(load_config(FilterConfig, None, base={**tree, "out": str(tmp_path / "other.parquet")}))
    assert not (tmp_path / "other.parquet").exists()


def test_an_engine_that_is_not_there_is_refused_before_a_step(tiny_folder, tmp_path, monkeypatch):
    tree = settings(tiny_folder, "align", tmp_path / "run", steps=3)
    tree["rollout"] = {**tree["rollout"], "engine": "vllm"}
    monkeypatch.setattr("prism_fast.steps.sampler.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"engine = vllm: needs the package vllm.*\[vllm\]', or set engine=builtin"):
        run_stage("align", tree)
    tree["rollout"]["engine"] = "sglang"
    with pytest.raises(DataError, match=r"rollout\.engine: expected 'builtin' or 'vllm', got 'sglang'"):
        load_config(AlignConfig, None, base=tree)


@pytest.mark.parametrize("stage", ["align", "rlvr", "pairs", "filter", "eval"])
@pytest.mark.parametrize("knob", ["top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty"])
def test_knobs_of_another_distribution_are_refused_by_name(stage, knob):
    section = {"eval": "eval.", "pairs": "", "filter": ""}.get(stage, "rollout.")
    with pytest.raises(DataError, match=rf"(^|; |: ){section}{knob} is refused: it samples from another distribution"):
        load_config(CONFIGS[stage], None, [f"{section}{knob}=0.9"])


def test_importance_weights_are_capped_where_an_engine_samples():
    with_engine, without = ({"rollout": {"prompts_per_step": 1, "engine": e}, "steps": 1} for e in ("vllm", "builtin"))
    missing = {"policy": {"path": "p"}, "data": {"files": "f"}, "run": {"out": "o"}}
    judged = {"discriminator": {"path": "d"}, "policy_optimizer": {"lr": 1}, "discriminator_optimizer": {"lr": 1}}
    aligned = [load_config(AlignConfig, None, base={**missing, **judged, **tree}) for tree in (with_engine, without)]
    assert [config.objective.importance_cap for config in aligned] == [2.0, None]
    rewarded = [
        load_config(CONFIGS["rlvr"], None, [*more], base={**missing, "optimizer": {"lr": 1}, **tree})
        for tree in (with_engine, without)
        for more in ((), ("objective.importance_cap=0",), ("objective.importance_cap=5",))
    ]
    caps = [c.objective.build(9, c.rollout.importance_cap).importance_cap for c in rewarded]
    assert caps == [2.0, None, 5.0, None, None, 5.0]
