"""The end of a step and of a stage: what is recorded, in which order, when it is saved, and what comes back."""

import json
import os
import signal

import pytest
import torch

from prism_fast.config import SFTConfig, WatchConfig
from prism_fast.records import DataError
from prism_fast.run import checkpoint
from prism_fast.run.monitor import read_metrics
from prism_fast.run.session import Clock, Session, Stopped

pytestmark = pytest.mark.usefixtures("torch_settings")


class Optimizer:
    def __init__(self):
        self.value, self.loaded = torch.zeros(2), None

    def tensors(self):
        return {"exp_avg.weight": self.value}

    def load(self, tensors, steps):
        self.value, self.loaded = tensors["exp_avg.weight"], steps


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

    def run(self, total, *, until=None, resume=False, accept_changes=False, fault=lambda step: None, **begin):
        def save(path):
            path.mkdir(parents=True)
            (path / "weight").write_text(str(self.weight))
            self.events.append("save")

        def evaluate():
            self.events.append("evaluate")
            accuracy = self.values.pop(0)
            return {"accuracy": accuracy}, accuracy

        with Session("sft", self.config, resume, accept_changes) as session:
            saved = session.saved("policy")
            self.weight = 0 if saved is None else int((saved / "weight").read_text())
            begin = {"evaluate": evaluate if self.values else None, "parts": {"counter": self.counter}, **begin}
            first = session.begin(total, models={"policy": save}, optimizers=self.optimizers, **begin)
            self.position = session.state.get("position", 0)
            for step in range(first, until or total):
                self.weight, self.counter.count = self.weight + 1, self.counter.count + 2
                self.position += 3
                for optimizer in self.optimizers.values():
                    optimizer.value = optimizer.value + self.weight
                warnings = ["odd"] if step % 2 else []
                metrics, state = {"loss": float(step), "format_valid": 0.0}, {"position": self.position}
                session.end_of_step(
                    step + 1, Clock(), {"update": 5}, metrics, warnings, state, fault and fault(step + 1)
                )
            return session.finish(["a.json:3: bad"]) if until is None else None


def lines(out):
    return [
        {name: value for name, value in line.items() if name != "time"} for line in read_metrics(out / "metrics.jsonl")
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
    file = tmp_path / "checkpoints/step-000001/trainer.json"
    state = json.loads(file.read_text())
    for bad in ({"count": -1}, {}, 3):
        file.write_text(json.dumps({**state, "counter": bad}))
        with pytest.raises(DataError, match=r"step-000001/trainer\.json: counter: "):
            Stage(tmp_path, save_every=1).run(3, resume=True)
    del state["counter"]  # written before there was a counter
    file.write_text(json.dumps(state))
    stage = Stage(tmp_path, save_every=1)
    stage.run(3, resume=True)
    assert stage.counter.count == 4
