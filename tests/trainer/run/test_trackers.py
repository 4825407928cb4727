"""Figures to W&B and TensorBoard: what is not installed says so, a resumed run goes on."""

import importlib.machinery
import importlib.util
import math
import sys
import types

import pytest

from prism_fast.records import DataError
from prism_fast.run.monitor import Monitor
from tests.trainer.run.test_monitor import stats


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=f"the package {name} is not installed: pip install {name}") as error:
        Monitor("sft", tmp_path / "sft", 2, tracker=name)
    assert "\n" not in str(error.value) and not (tmp_path / "sft").exists()
    Monitor("sft", tmp_path, 2, tracker=name, active=False)  # other ranks need no tracker


def test_a_folder_named_like_the_tracker_is_not_its_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    spec = importlib.machinery.PathFinder.find_spec("wandb", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(DataError, match="not installed"):
        Monitor("sft", tmp_path, 2, tracker="wandb")
    with pytest.raises(ValueError, match="tracker"):
        Monitor("sft", tmp_path, 2, tracker="mlflow")


def test_weights_and_biases_gets_the_figures_and_resumes_its_run(tmp_path, monkeypatch):
    logged, opened = [], []

    class FakeRun:
        def log(self, figures, step):
            logged.append((step, figures))

        def finish(self):
            logged.append("finished")

    fake = types.ModuleType("wandb")
    fake.Settings = lambda **options: options
    fake.init = lambda **options: opened.append(options) or FakeRun()
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="fake")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 1, 0):
        with Monitor("sft", tmp_path / "sft", 2, tracker="wandb", start_step=start, quiet=True) as monitor:
            monitor.step(stats(start + 1, entropy=math.nan))
    assert logged[0][0] == 1 and logged[0][1]["loss"] == 1.0
    assert "entropy" not in logged[0][1] and "step" not in logged[0][1]
    assert logged[1] == "finished" and len(logged) == 6
    identities = [options["id"] for options in opened]
    assert identities[0] == identities[1] != identities[2]  # resumed, then a new run
