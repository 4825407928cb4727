"""The end of a step and of a stage: what is recorded, in which order, when it is saved, and what comes back."""

import errno
import json
import os
import signal
import types
from dataclasses import replace

import pytest
import torch

from prism_fast import metric_names as names
from prism_fast.config import SFTConfig, WatchConfig
from prism_fast.records import DataError, Fault
from prism_fast.run import checkpoint, saving
from prism_fast.run.monitor import read_metrics
from prism_fast.run.session import Clock, Session
from prism_fast.run.signals import Stopped
from tests.damage import edit_state

pytestmark = pytest.mark.usefixtures("torch_settings")


class Optimizer:
    def __init__(self):
        self.value, self.loaded, self.measured = torch.zeros(2), None, {}

    def tensors(self, parts):
        return {"exp_avg.weight": self.value}

    def load(self, tensors, steps):
        self.value, self.loaded = tensors["exp_avg.weight"], steps

    def figures(self):
        measured, self.measured = self.measured, {}
        return measured


class Counter:
    def __init__(self):
        self.count = 0

    def state(self):
        return {"count": self.count}

    def load(self, state):
        if state["count"] < 0:
            raise ValueError(f"count: expected at least 0, got {state['count']}")
        self.count = state["count"]


class Stage:
    """A stage of a made-up model that one number stands for."""

    def __init__(self, out, data="nowhere.json", lr=1e-3, **config):
        tree = {"model": {"path": "nowhere"}, "data": {"files": [data]}, "optimizer": {"lr": lr}, "steps": 9}
        self.config = SFTConfig.model_validate({**tree, "run": {"out": out, "threads": 1, **config}})
        self.weight, self.optimizers, self.counter = 0, {"a/": Optimizer(), "b/": Optimizer()}, Counter()
        self.values: list[float] = []  # of evaluations, in turn
        self.events: list[str] = []

    def run(
        self, total, *, until=None, resume=False, accept_changes=False, fault=lambda step: None, records=9, **begin
    ):
        def collect(parts):
            weight = self.weight  # the run goes on while it is written

            def save(path):
                path.mkdir(parents=True)
                (path / "weight").write_text(str(weight))
                self.events.append("save")

            return save

        def evaluate():
            self.events.append("evaluate")
            accuracy = self.values.pop(0)
            return {"accuracy": accuracy}, accuracy

        with Session("sft", self.config, resume, accept_changes) as run:
            saved = run.saved("policy")
            self.weight = 0 if saved is None else int((saved / "weight").read_text())
            run.loaded(records)
            begin = {"evaluate": evaluate if self.values else None, "parts": {"counter": self.counter}, **begin}
            first = run.begin(total, models={"policy": collect}, optimizers=self.optimizers, **begin)
            self.position = run.state.get("position", 0)
            for step in range(first, until or total):
                self.weight, self.counter.count = self.weight + 1, self.counter.count + 2
                self.position += 3
                for optimizer in self.optimizers.values():
                    optimizer.value = optimizer.value + self.weight
                warnings = ["odd"] if step % 2 else []
                metrics, state = {"loss": float(step), "format_valid": 0.0}, {"position": self.position}
                what = fault and fault(step + 1)
                broken = Fault(what, (f"data:{step + 1}",)) if isinstance(what, str) else None
                run.end_of_step(step + 1, Clock(), {"update": 5}, metrics, warnings, state, broken)
            return run.finish(["a.json:3: bad"]) if until is None else None


def lines(out):
    return [
        {name: value for name, value in line.items() if name != "time"} for line in read_metrics(out / "metrics.jsonl")
    ]


def test_packs_that_did_not_fit_are_told_once_and_counted(tmp_path):
    """Of all models together; where each process has its own count, `test_session_ranks.py`."""
    stage = Stage(tmp_path, tokens_per_pack=512)

    def measured(step):
        for optimizer in stage.optimizers.values() if step in (1, 2) else ():
            optimizer.measured = {names.HALVED_PACKS: step + 1.0, names.HOST_WAIT: 0.25}

    stage.run(4, fault=measured)
    found = lines(tmp_path)
    counts = [(line.get("packs_halved"), line.get("host_wait")) for line in found if "loss" in line]
    assert counts == [(4.0, 0.5), (6.0, 0.5), (None, None), (None, None)]
    said = [line for line in found if "memory" in line.get("warning", "")]
    assert said == [
        {
            "step": 1,
            "warning": "step 1: 4 packs did not fit in memory and went in two halves, which takes longer; lower "
            "run.tokens_per_pack (now 512)",
        }
    ]


def test_a_step_is_recorded_then_warned_of_evaluated_and_saved(tmp_path):
    stage = Stage(tmp_path, save_every=2, eval_every=2, keep_last=9)
    stage.values = [0.5, 0.75]
    assert stage.run(3, watch=WatchConfig(patience=2)) == {"accuracy": 0.75}
    step = {"format_valid": 0.0, "tokens/update": 5}
    alert = (
        "format validity falls: 0.0%, for 2 steps below 50.0% (best 0.0%); "
        "raise the format penalty or lower the learning rate"
    )
    assert lines(tmp_path) == [
        {"step": 1, "loss": 0.0, **step},
        {"step": 2, "loss": 1.0, **step},
        {"step": 2, "warning": alert},
        {"step": 2, "warning": "step 2: odd"},
        {"step": 2, "eval/accuracy": 0.5},
        {"step": 3, "loss": 2.0, **step},
        {"step": 3, "eval/accuracy": 0.75},
        {"step": 3, "warning": "skipped: a.json:3: bad"},
    ]
    assert stage.events == ["evaluate", "save", "evaluate", "save", "save"]  # the last: OUT/final
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 3]
    assert (tmp_path / "final" / "policy" / "weight").read_text() == "3"


def test_a_checkpoint_brings_everything_back(tmp_path):
    whole, cut = Stage(tmp_path / "whole", save_every=2), Stage(tmp_path / "cut", save_every=2)
    whole.run(6)
    cut.run(6, until=5)
    again = Stage(tmp_path / "cut", save_every=2)
    again.run(6, resume=True)
    assert {optimizer.loaded for optimizer in again.optimizers.values()} == {4}
    assert (again.weight, again.position, again.counter.count) == (whole.weight, whole.position, whole.counter.count)
    for name, optimizer in again.optimizers.items():
        assert torch.equal(optimizer.value, whole.optimizers[name].value)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    state = json.loads((tmp_path / "cut/checkpoints/step-000006/trainer.json").read_text())
    assert (state["position"], state["counter"], state["stage"], state["threads"]) == (18, {"count": 12}, "sft", 1)


def test_the_best_checkpoint_is_kept_and_remembered(tmp_path):
    stage = Stage(tmp_path, save_every=0, eval_every=1, keep_last=1)
    stage.values = [0.9, 0.1]
    stage.run(5, until=2)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]
    again = Stage(tmp_path, save_every=0, eval_every=1, keep_last=1)
    again.values = [0.1, 0.5, 0.9, 0.2]  # from step 2 on; none is better
    again.run(5, resume=True)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 5]


def test_a_signal_stops_at_the_end_of_the_step_saved(tmp_path):
    stage = Stage(tmp_path, save_every=0, eval_every=1)
    before = signal.getsignal(signal.SIGTERM)

    def evaluate():
        os.kill(os.getpid(), signal.SIGTERM)
        return {}, 0.0

    with pytest.raises(Stopped, match=r"by SIGTERM; saved .*step-000001; go on with --resume") as stopped:
        stage.run(9, evaluate=evaluate)
    assert stopped.value.signum == signal.SIGTERM
    assert checkpoint.steps(tmp_path / "checkpoints") == [1] and not (tmp_path / "final").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_state_of_another_sort_is_named_and_a_missing_one_is_left(tmp_path):
    Stage(tmp_path, save_every=1).run(3, until=1)
    saved = tmp_path / "checkpoints/step-000001"
    for bad in ({"count": -1}, {}, 3):
        edit_state(saved, counter=bad)
        with pytest.raises(DataError, match=r"step-000001/trainer\.json: counter: "):
            Stage(tmp_path, save_every=1).run(3, resume=True)
    edit_state(saved, counter=...)  # written before there was a counter
    stage = Stage(tmp_path, save_every=1)
    stage.run(3, resume=True)
    assert stage.counter.count == 4


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_every_signal_that_asks_to_stop_saves(signum, tmp_path):
    with pytest.raises(Stopped, match=signal.Signals(signum).name):
        Stage(tmp_path, save_every=0).run(3, fault=lambda step: os.kill(os.getpid(), signum))
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]


def test_a_terminal_that_closes_under_nohup_stops_nothing(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        Stage(tmp_path).run(3, fault=lambda step: os.kill(os.getpid(), signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_in_use_is_refused(tmp_path):
    first = Stage(tmp_path, save_every=1)

    def meanwhile(step):
        for resume in (False, True):
            with pytest.raises(DataError, match="in use by process"):
                Stage(tmp_path, save_every=1).run(3, resume=resume)

    first.run(3, fault=meanwhile)
    assert lines(tmp_path)[0]["loss"] == 0.0 and checkpoint.steps(tmp_path / "checkpoints") == [2, 3]
    Stage(tmp_path, save_every=1).run(5, resume=True)


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    Stage(tmp_path).run(3)
    (tmp_path / "checkpoints/.step-000004.partial/policy").mkdir(parents=True)
    Stage(tmp_path).run(5, resume=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_nothing_to_resume_is_an_error_and_nothing_saved_is_a_fresh_start(tmp_path):
    for folder in ("mistyped", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=f"{folder}: holds no run to resume"):
            Stage(tmp_path / folder).run(3, resume=True)
    assert not (tmp_path / "mistyped").exists() and not any((tmp_path / "empty").iterdir())
    Stage(tmp_path / "run", save_every=0).run(3, until=2)  # ends before it saves
    Stage(tmp_path / "run", save_every=0, lr=1.0).run(3, resume=True)
    assert lines(tmp_path / "run")[0] == {"step": 0, "warning": "nothing was saved before; begins at step 0"}
    assert (tmp_path / "run/final/policy/weight").read_text() == "3"


def test_other_settings_and_data_are_refused_or_accepted(tmp_path):
    data = tmp_path / "data.json"
    data.write_text("[]")
    Stage(tmp_path / "run", data).run(3)
    data.write_text("[1]")
    other = {"data": data, "lr": 1e-2, "seed": 5, "save_every": 7}
    expected = (
        r"step-000003: the run would go on with other settings: optimizer.lr: 0.001 -> 0.01; run.seed: 0 -> 5; data"
    )
    with pytest.raises(DataError, match=rf"{expected}.*--accept-changes"):
        Stage(tmp_path / "run", **other).run(4, resume=True)
    Stage(tmp_path / "run", **other).run(4, resume=True, accept_changes=True)
    warned = [line["warning"] for line in lines(tmp_path / "run") if "warning" in line and line["step"] == 3]
    assert "resumed with other settings: run.seed: 0 -> 5" in warned
    made = json.loads((tmp_path / "run/run.json").read_text())
    assert made["config"]["run"]["seed"] == 5 and made["config"]["optimizer"]["beta2"] == 0.999
    first, second = made["starts"]
    assert (first["step"], second["step"], len(second["changed"])) == (0, 3, 3)
    Stage(tmp_path / "run", **other).run(5, resume=True)  # what was accepted is now its own


def test_another_number_of_good_records_is_another_order(tmp_path):
    """Images are mended, say, while data.skip_bad_records allows that they are bad."""
    Stage(tmp_path).run(3, records=7)
    Stage(tmp_path).run(4, records=7, resume=True)
    with pytest.raises(DataError, match=r"step-000004: .*good records of data\.files: 7 -> 8; .*--accept-changes"):
        Stage(tmp_path).run(5, records=8, resume=True)
    Stage(tmp_path).run(5, records=8, resume=True, accept_changes=True)
    assert any("7 -> 8" in line.get("warning", "") for line in lines(tmp_path))
    Stage(tmp_path).run(6, records=8, resume=True)  # what was accepted is now its own
    assert json.loads((tmp_path / "run.json").read_text())["records"] == 8


def test_a_checkpoint_without_a_record_resumes_with_a_warning(tmp_path):
    Stage(tmp_path).run(3)
    edit_state(tmp_path / "checkpoints/step-000003", run=...)
    Stage(tmp_path, lr=1.0).run(4, resume=True)
    assert "has no record of its settings" in json.dumps(lines(tmp_path))


def test_a_run_that_is_past_its_end_is_not_called_done(tmp_path):
    Stage(tmp_path).run(3)
    with pytest.raises(DataError, match=r"step-000003: is past the 2 steps .* steps=3"):
        Stage(tmp_path).run(2, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 2},  # in the folder of another
        {"step": "1"},
        {"step": None},
        {"step": True},
        {"best": "x"},
        {"best_value": [1]},
        {"threads": "1"},
        {"skipped_updates": "1"},
        {"run": 5},
        {"run": {}},
        {"run": {"stage": "sft", "config": {}, "inputs": [], "environment": {}, "starts": []}},
    ],
    ids=str,
)
def test_a_damaged_state_is_one_line(change, tmp_path):
    Stage(tmp_path, save_every=1).run(3, until=1)
    edit_state(tmp_path / "checkpoints/step-000001", **change)
    with pytest.raises(DataError, match=rf"step-000001.*trainer\.json: {next(iter(change))}") as refused:
        Stage(tmp_path, save_every=1).run(3, resume=True)
    assert "\n" not in str(refused.value) and "remove" in str(refused.value)


def test_an_optimizer_that_refuses_its_tensors_names_the_file(tmp_path):
    def refuse(self, tensors, steps):
        raise ValueError("no exp_avg.weight")

    Stage(tmp_path, save_every=1).run(3, until=1)
    again = Stage(tmp_path, save_every=1)
    again.optimizers["a/"].load = types.MethodType(refuse, again.optimizers["a/"])
    with pytest.raises(
        DataError, match=r"step-000001/trainer\.safetensors: a/no exp_avg\.weight; remove the checkpoint"
    ):
        again.run(3, resume=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_the_folder_of_a_model_is_no_place_for_a_run(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"is the folder of a model; choose another run\.out, such as .*-sft"):
        Stage(tmp_path).run(3)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["run.json", "checkpoints", "final", "run.lock", "metrics.jsonl"])
def test_what_is_in_the_way_stays(name, tmp_path):
    if name in ("run.lock", "metrics.jsonl"):
        (tmp_path / name).mkdir()
        (tmp_path / "metrics.previous.jsonl").write_text("{}")
    else:
        (tmp_path / name).write_text("mine")
    with pytest.raises(DataError) as refused:
        Stage(tmp_path).run(3)
    assert "\n" not in str(refused.value) and name in str(refused.value)
    assert (tmp_path / name).is_dir() or (tmp_path / name).read_text() == "mine"


class FullDisk:
    """A disk that is full while the steps in ``when`` are saved."""

    def __init__(self, monkeypatch, when, error):
        write, write_aside = checkpoint.Part.write, saving.write_aside

        def try_to_save(part, folder):
            return write(replace(part, models={"policy": self.refuse}) if part.step in when else part, folder)

        def try_final(target, write):
            if 0 in when:
                self.refuse(target)
            write_aside(target, write)

        self.error = error
        monkeypatch.setattr(checkpoint.Part, "write", try_to_save)
        monkeypatch.setattr(saving, "write_aside", try_final)

    def refuse(self, path):
        raise self.error


NO_SPACE = (OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)"))


@pytest.mark.parametrize("error", NO_SPACE)
def test_a_checkpoint_that_cannot_be_written_is_a_warning(error, tmp_path, monkeypatch):
    FullDisk(monkeypatch, {4}, error)
    stage = Stage(tmp_path, save_every=2, keep_last=9)
    stage.run(7)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 6, 7]
    text = f"the checkpoint could not be written (No space left on device); the last one is {tmp_path}"
    assert text in json.dumps(lines(tmp_path))
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_the_best_checkpoint_is_not_given_up_for_one_that_was_not_written(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {2}, NO_SPACE[0])
    stage = Stage(tmp_path, save_every=0, eval_every=1, keep_last=1)
    stage.values = [0.5, 0.9, 0.1, 0.2]
    stage.run(4)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 4]


def test_a_final_model_that_cannot_be_written_is_one_line_and_resumes(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        FullDisk(patch, {3, 0}, NO_SPACE[0])
        with pytest.raises(DataError, match=r"final: could not be written \(No space.*--resume from .*step-000002"):
            Stage(tmp_path, save_every=2).run(3)
    Stage(tmp_path, save_every=2).run(3, resume=True)
    assert (tmp_path / "final/policy/weight").read_text() == "3"


def test_a_stop_that_cannot_save_says_so(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {2}, NO_SPACE[0])
    with pytest.raises(DataError, match=r"stopped by SIGTERM at step 2; .*No space.*last one is .*step-000001"):
        Stage(tmp_path, save_every=1).run(
            5, fault=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None
        )


def test_a_bug_while_saving_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {2}, RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        Stage(tmp_path, save_every=1).run(5)


def test_signals_are_the_callers_again_whatever_the_end_raises(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {1}, RuntimeError("shapes"))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="shapes"):
        Stage(tmp_path, save_every=1).run(5, until=1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_skipped_updates_in_a_row_stop_the_run(tmp_path):
    broken = {2, 4, 5, 6}
    stage = Stage(tmp_path, save_every=0, max_skipped_updates=3)
    with pytest.raises(DataError, match=r": 3 updates in a row were skipped, the last as score 6 is NaN; .*-000006"):
        stage.run(9, fault=lambda step: f"score {step} is NaN" if step in broken else None)
    assert checkpoint.steps(tmp_path / "checkpoints") == [6] and not (tmp_path / "final").exists()
    counted = {line["step"]: line["skipped_updates"] for line in lines(tmp_path) if "skipped_updates" in line}
    assert counted == {2: 1, 4: 1, 5: 2, 6: 3}
    skipped = [json.loads(line) for line in (tmp_path / "skipped_updates.jsonl").read_text().splitlines()]
    assert skipped[1:2] == [{"step": 4, "what": "score 4 is NaN", "records": ["data:4"]}] and len(skipped) == 4
    with pytest.raises(DataError, match="3 updates in a row"):  # three more are allowed, and no more
        Stage(tmp_path, save_every=0, max_skipped_updates=3).run(9, resume=True, fault=lambda step: "NaN")
    assert lines(tmp_path)[-1]["step"] == 9
    free = Stage(tmp_path, save_every=0, max_skipped_updates=0)
    free.run(12, resume=True, fault=lambda step: "NaN")


def test_skipped_updates_are_counted_over_a_resume(tmp_path):
    Stage(tmp_path, save_every=2, max_skipped_updates=3).run(9, until=2, fault=lambda step: "NaN")
    with pytest.raises(DataError, match="stopped at step 3"):
        Stage(tmp_path, save_every=2, max_skipped_updates=3).run(9, resume=True, fault=lambda step: "NaN")
