"""The sentence on every stage and what it says to do, judged by hand on made-up run folders."""

import json
import os

import pytest

from prism_fast.records import DataError
from prism_fast.report.build import report_html
from prism_fast.report.data import load_run
from prism_fast.report.findings import findings
from prism_fast.run.alerts import Watch

SIDES = ("perception", "reasoning")


def both(name, value):
    return {f"{name}/{side}": value for side in SIDES}


def loads(shares, layers=(1,)):
    return {f"expert_load/{layer}/prompt/{e}": share for layer in layers for e, share in enumerate(shares)}


def stage(out, name, figures, count=40, **about):
    """``figures``: values, or functions of the step that give ... where the figure is absent."""
    evals, warnings = about.get("evals", {}), about.get("warnings", [])
    lines = []
    for step in range(1, count + 1):
        values = {key: value(step) if callable(value) else value for key, value in figures.items()}
        lines.append({"step": step, "time": 1.0} | {key: value for key, value in values.items() if value is not ...})
        lines += [{"step": step, **{f"eval/{k}": v for k, v in e.items()}} for at, e in evals.items() if at == step]
    lines += [{"step": count, "time": 1.0, "warning": text} for text in warnings]
    (out / name).mkdir()
    (out / name / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + about.get("tail", "")
    )
    if about.get("recorded", True):
        settings = {"steps": count, "run": {"max_skipped_updates": 10}, **about.get("config", {})}
        (out / name / "run.json").write_text(json.dumps({"stage": name, "config": settings}))
    if about.get("finished", True):
        (out / name / "final").mkdir()


def held_out(accuracy, valid=0.95):
    return {40: {"accuracy": accuracy, "format_valid": valid}}


def until(step, before, after):
    return lambda now: before if now < step else after


SFT = {"loss": lambda step: 2 / step, "grad_norm": 1.0}
WARM = {**both("pair_accuracy", 0.95), "loss": lambda step: 1 / step, **loads([0.25] * 4)}
ALIGN = {"format_valid": 0.9, "entropy": 0.5, "grad_norm/policy": 1.0, **both("discriminator_accuracy", 0.8)}
RLVR = {"reward": lambda step: 0.3 + step / 100, "format_valid": 0.95, "entropy": 0.5, "grad_norm": 1.0}
PAIRS = {40: {"pair_accuracy_perception": 0.9, "pair_accuracy_reasoning": 0.95}}

# (stage, its figures, arguments of `stage`, what is said, what is not); "" among the latter: nothing stands out
CASES = {
    "sound": ("sft", SFT, {"evals": held_out(0.5)}, ["40 steps: held-out accuracy 50.0%", "loss 0.36 to 0.0681"], [""]),
    "one step": ("rlvr", RLVR, {"count": 1}, ["1 step."], ["1 steps", "no gain"]),
    "empty": ("sft", SFT, {"count": 0}, ["left no figures", "no step was recorded"], ["not finished"]),
    "only warnings": ("sft", SFT, {"count": 0, "warnings": ["resumed"]}, ["no step was recorded"], []),
    "torn": ("sft", SFT, {"evals": held_out(0.5), "tail": '{"step": 41, "lo'}, ["40 steps"], [""]),
    "done twice": ("sft", SFT, {"evals": held_out(0.5), "tail": '{"step": 40, "loss": 0.05}\n'}, ["40 steps"], [""]),
    "unknown": ("sft", SFT | {"my/own": 3, "text": "x", "seconds/odd": "x"}, {"evals": held_out(0.5)}, [], [""]),
    "beyond floats": ("sft", SFT | {"seconds/x": 10**400, "n": 10**400}, {"evals": held_out(0.5)}, [], [""]),
    "crashed": ("align", ALIGN, {"count": 23, "finished": False, "config": {"steps": 100}},
                ["23 of 100 steps", "it is not finished; go on with --resume"], ["nothing was measured"]),
    "of a version without records": ("align", ALIGN, {"finished": False, "recorded": False}, [], ["not finished"]),
    "stopped": ("rlvr", RLVR | {"grad_norm": until(16, 1.0, None)}, {"count": 25, "finished": False},
                ["stopped itself after 10 skipped", "lower the learning rate, and go on with"], ["not finished"]),
    "stopped by the run's limit": ("sft", SFT | {"grad_norm": until(6, 1.0, None)},
                                   {"count": 8, "finished": False, "config": {"run": {"max_skipped_updates": 3}}},
                                   ["stopped itself after 3"], []),
    "scores not finite": ("align", ALIGN | {"grad_norm/policy": until(11, 1.0, ...), "score/teacher_reasoning": None},
                          {"count": 20, "finished": False}, ["stopped itself after 10"], []),
    "skipped": ("sft", SFT | {"grad_norm": lambda step: None if step in (3, 9) else 1.0}, {"evals": held_out(0.5)},
                ["2 of 40 updates were skipped, the last at step 9"], ["stopped", "not finished"]),
    "all nan": ("align", dict.fromkeys(ALIGN), {}, ["40 of 40 updates were skipped"], []),
    "chance": ("warmup", WARM | both("pair_accuracy", 0.51), {},
               ["guesses on perception: 51.0%", "guesses on reasoning", "train the warm-up for longer"], []),
    "chance on one side": ("warmup", WARM, {"evals": {40: PAIRS[40] | {"pair_accuracy_reasoning": 0.55}}},
                           ["guesses on reasoning: 55.0%"], ["on perception"]),
    "swapped": ("warmup", WARM | both("pair_accuracy", 0.05), {}, ["teacher on reasoning: 5.0%"], ["guesses"]),
    "chance in alignment": ("align", ALIGN | both("discriminator_accuracy", 0.5), {}, ["guesses on perception"], []),
    "even in the end": ("align", ALIGN | both("discriminator_accuracy", lambda step: 0.9 - step / 100),
                        {"evals": held_out(0.5)}, [], [""]),
    "equal parts": ("align", ALIGN | {"equal_parts/perception": 0.75, "equal_parts/reasoning": 0.0}, {},
                    ["parts that are the teacher's own: perception 75.0%, reasoning 0.0%, so pair losses are at least "
                     "perception 0.52, reasoning 0.00"], []),
    "style alone": ("align", ALIGN | {"content/perception": 0.51, "style/perception": 0.8, "content/reasoning": 0.9,
                                      "style/reasoning": 0.8}, {},
                    ["the discriminator's perception scores follow form or length alone (rank correlation +0.80): of "
                     "two parts of equal form the right one scores higher in 51.0%", "hard negatives"],
                    ["reasoning scores follow"]),
    "no equal parts": ("align", ALIGN | both("equal_parts", 0.002), {}, [], ["teacher's own"]),
    "outrun": ("align", ALIGN | both("discriminator_accuracy", lambda step: 0.9 - step / 50), {},
               ["the policy has outrun the discriminator on perception"], []),
    "saturated": ("align", ALIGN | both("discriminator_accuracy", 0.99), {},
                  ["from step 20 on, the discriminator saturates on perception", "saturates on reasoning"], []),
    "experts": ("warmup", WARM | loads([0.5, 0.5, 0.0, 0.0], range(28)), {"evals": PAIRS},
                ["from step 20 on, experts collapse in layers 0, 1, 2, 3, 4, 5 and 22 more (here of layer 0)"],
                ["at the end"]),
    "experts that recovered": ("align", ALIGN | {n: until(26, s, 0.25) for n, s in loads([0.5, 0.5, 0.0, 0.0]).items()},
                               {"evals": held_out(0.5)}, ["from step 20 until step 26, experts collapse in layer 1"],
                               ["at the end"]),
    "experts at the end": ("align", ALIGN | {n: until(36, 0.25, s) for n, s in loads([0.5, 0.5, 0.0, 0.0]).items()},
                           {"evals": held_out(0.5)},
                           ["experts have collapsed in layer 1: at the end, experts 2, 3 got less than 2.5%"], []),
    "entropy": ("rlvr", RLVR | {"entropy": until(21, 1.0, 0.01)}, {}, ["from step 40 on, entropy collapses"], []),
    "format fell twice": ("rlvr", RLVR | {"format_valid": lambda step: 0.3 if step % 20 > 5 else 0.95},
                          {"config": {"watch": {"patience": 5}}, "evals": held_out(0.5)},
                          ["from step 30 until step 40, format validity falls: 30.0%, for 5 steps"], ["from step 10"]),
    "invalid": ("sft", SFT, {"evals": held_out(0.1, 0.2)}, ["only 20.0% of the responses have a valid format"], []),
    "thresholds of the run": ("rlvr", RLVR | {"format_valid": 0.3}, {
        "evals": held_out(0.5, 0.3), "config": {"watch": {"format_floor": 0.1, "future": 1}}}, [], [""]),
    "sampler": ("rlvr", RLVR | {"sampler_gap/mean": 0.3}, {}, ["disagree: 0.3", "importance_cap"], []),
    "no signal": ("rlvr", RLVR | {"zero_advantage": 0.97}, {}, ["97.0% have no advantage", "data filter"], []),
    "cut": ("rlvr", RLVR | {"response_length": 98.0}, {"config": {"rollout": {"max_response_tokens": 100}}},
            ["98 tokens on average of at most 100"], []),
    "no evaluation": ("rlvr", RLVR, {}, ["reward 0.405 to 0.605", "nothing was measured"], ["no gain"]),
    "no reward": ("rlvr", RLVR | {"reward": 0.4}, {}, ["no gain: the reward in training went from 0.4 to 0.4"], []),
    "past its best": ("rlvr", RLVR, {"evals": {20: {"accuracy": 0.8}} | held_out(0.6)},
                      ["80.0% (step 20) to 60.0%", "from its best, 80.0% at step 20, to 60.0%"], ["no gain"]),
    "a reward of one's own": ("rlvr", RLVR, {"evals": {20: {"accuracy": 12.5}} | held_out(12.4)},
                              ["12.5 (step 20) to 12.4", "no gain: held-out accuracy went from 12.5 to 12.4"], ["%)"]),
    "loss": ("sft", SFT | {"loss": lambda step: step / 10}, {}, ["the loss rose from 1.05 to 3.05"], []),
    "late judge": ("rlvr", RLVR | {"judge/late": lambda step: float(step in (3, 4))}, {}, ["in time on 2 answers"], []),
    "halved packs": ("sft", SFT | {"packs_halved": lambda step: float(step in (3, 4))}, {"evals": held_out(0.5)},
                     ["2 packs did not fit in memory and went in two halves", "lower run.tokens_per_pack"], []),
    "uneven processes": ("rlvr", RLVR | {"balance/cpu_seconds": 1.9, "balance/sampled_tokens": 1.2}, {},
                         ["1.9 times the mean of computing time"], []),
    "even processes": ("rlvr", RLVR | {"balance/cpu_seconds": 1.1}, {"evals": held_out(0.5)}, [], [""]),
    "idle": ("rlvr", {"lr": 1e-5, "dropped_groups": 8}, {}, ["40 of 40 steps updated nothing"], ["skip"]),
    "warnings": ("sft", SFT, {"warnings": ["a", {"b": None}], "evals": held_out(0.5)}, ["2 other warnings"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_a_stage(name, tmp_path):
    of, figures, arguments, said, not_said = CASES[name]
    stage(tmp_path, of, figures, **arguments)
    (found,) = findings(load_run(tmp_path))
    text = " | ".join((found.happened, *found.todo))
    for part in said:
        assert part in text, part
    for part in not_said:
        assert part not in text if part else not found.todo, part


def test_a_stage_compares_with_the_one_before(tmp_path):
    stage(tmp_path, "sft", SFT, evals=held_out(0.6))
    stage(tmp_path, "rlvr", RLVR, evals=held_out(0.5))
    _, last = findings(load_run(tmp_path))
    assert "accuracy 60.0% (after SFT) to 50.0%" in last.happened
    assert last.todo[0].startswith("no gain: held-out accuracy went from 60.0% to 50.0%")
    drift = {
        "sft": {"caption_items": 1.0, "reasoning_steps": 2.0},
        "align": {"caption_items": 1.5, "reasoning_steps": 0.1},
    }
    (tmp_path / "summary.json").write_text(json.dumps({"stages": {"align": {"accuracy": 1.0}}, "drift": drift}))
    stage(tmp_path, "align", ALIGN)
    run = load_run(tmp_path)
    _, middle, last = findings(run)
    assert (
        middle.happened.startswith("40 steps: held-out accuracy 60.0% to 100.0%") and "100.0% to 50.0%" in last.happened
    )
    assert len(middle.todo) == 1 and "the distance of its caption items grew from 1.00 to 1.50" in middle.todo[0]
    assert "it drifts from the teacher" in report_html(run)


def test_both_ways_from_the_demos_drift_start_there(tmp_path):
    stage(tmp_path, "sft", SFT, evals=held_out(0.5))
    stage(tmp_path, "drift", SFT, evals=held_out(0.4))
    stage(tmp_path, "align", ALIGN, evals=held_out(0.55))
    stage(tmp_path, "direct", RLVR, evals=held_out(0.45))
    found = {each.stage: each for each in findings(load_run(tmp_path))}
    assert "held-out accuracy 50.0% to 40.0%" in found["Drift"].happened and not found["Drift"].todo
    assert "held-out accuracy 40.0% to 55.0%" in found["Alignment"].happened
    assert "held-out accuracy 40.0% to 45.0%" in found["RLVR alone"].happened


def test_probes_are_told_in_their_order(tmp_path):
    blind = {"auc_form": 0.5, "auc_form_length": 0.48, "pairs_form_length": 90, "rank_length": 0.93, "rank_right": 0.1}
    sees = {"auc_form": 0.96, "pairs_form": 400, "rank_form": 0.7, "rank_right": 0.8}
    (tmp_path / "probes").mkdir()
    for at, (name, side) in enumerate((("before", blind), ("after", sees))):
        path = tmp_path / "probes" / f"{name}.json"
        path.write_text(json.dumps({"perception": side, "reasoning": {}, "alerts": []}))
        os.utime(path, (at, at))
    before, after = findings(load_run(tmp_path))
    assert before.stage == "Probe before" and after.stage == "Probe after"
    assert "of equal form, the right one scores higher in 50.0% of the pairs, and of equal length too in 48.0%" in (
        before.happened
    )
    assert "perception scores follow length alone (rank correlation +0.93)" in before.todo[0] and not after.todo
    assert "rank correlation with what is right +0.80" in after.happened
    assert "Probe before" in report_html(load_run(tmp_path))


def test_a_live_warning_is_not_counted_as_another(tmp_path):
    few = loads([0.5, 0.5, 0.0, 0.0], range(3)) | {"sampler_gap/mean": 0.3}
    watch, warned = Watch(), []
    for _ in range(40):
        warned += watch.observe(_Step(few))
    assert len(warned) == 2 and "experts collapse in layers 0, 1, 2" in warned[0]
    stage(tmp_path, "align", ALIGN | few, warnings=warned, evals=held_out(0.5))
    (found,) = findings(load_run(tmp_path))
    assert sorted(found.todo) == sorted(f"from step 20 on, {text}" for text in warned)


class _Step:
    def __init__(self, metrics):
        self.metrics = metrics


@pytest.mark.parametrize(
    "record, fault",
    [
        ('{"config": {"watch": {"patience": -3}}}', r"^align/run\.json: watch\.patience: .*greater than"),
        ('{"config": {"watch": {"saturation": "high"}}}', r"^align/run\.json: watch\.saturation"),
        ('{"config": ', r"align/run\.json: does not hold readable JSON"),
        ("[" * 100_000, r"align/run\.json: does not hold readable JSON"),
        ("[]", r"align/run\.json: expected a JSON object, got list"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, record, fault):
    stage(tmp_path, "align", ALIGN)
    (tmp_path / "align" / "run.json").write_text(record)
    with pytest.raises(DataError, match=fault) as error:
        findings(load_run(tmp_path))
    assert "\n" not in str(error.value)
