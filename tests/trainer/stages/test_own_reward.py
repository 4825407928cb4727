"""RLVR and eval with a reward function of a user's own, from the start of a run to its end."""

import json
from pathlib import Path

import pytest

from prism_fast import cli
from prism_fast.config import OwnReward
from prism_fast.records import DataError
from prism_fast.reward.own import function_of
from prism_fast.run.monitor import read_metrics
from tests.tiny_run import run_stage, settings

pytestmark = pytest.mark.usefixtures("torch_settings")

FUNCTIONS = """
import os, sys, time
def length(response, record, images):
    assert record.pop("gold") and len(images) == 1 and os.path.exists(images[0])
    print("length:", len(response))
    return len(response) / 100
def forks(response, record, images):
    return float(os.fork() == 0)
def nothing(response, record, images): pass
def word(response, record, images): return "0.5"
def nan(response, record, images): return float("nan")
def tensor(response, record, images):
    import torch
    return torch.ones(2)
def raises(response, record, images): raise KeyError("a\\nb")
def leaves(response, record, images): sys.exit("bye")
def killed(response, record, images): os.kill(os.getpid(), 9)
def eats(response, record, images): bytearray(8 << 30)
def sleeps(response, record, images): time.sleep(60)
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    yield tmp_path / "mine.py"
    function_of.cache_clear()


def short(tiny_folder, out, name, steps=1, **reward):
    tree = settings(tiny_folder, "rlvr", out, steps=steps)
    tree["rollout"] |= {"prompts_per_step": 2, "samples": 2, "max_response_tokens": 4}
    tree["run"] |= {"save_every": 1, "eval_every": 0}
    return {**tree, "reward": {"function": name, "replaces": "reward", **reward}}


def test_rlvr_trains_on_it_records_it_and_resumes_with_it(mine, tiny_folder, tmp_path, capfd):
    tree = short(tiny_folder, tmp_path / "out", f"{mine}:length")
    run_stage("rlvr", tree)
    (line,) = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "reward" in line]
    assert 0 < line["reward"] < 1 and "length:" in capfd.readouterr().err
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["reward"]["function"] == f"{mine}:length"
    assert record["inputs"]["reward.file"].keys() >= {"path", "sha256"}
    run_stage("rlvr", {**tree, "steps": 2}, resume=True)
    mine.write_text(FUNCTIONS + "# another\n")
    with pytest.raises(DataError, match=r"reward\.file"):
        run_stage("rlvr", {**tree, "steps": 3}, resume=True)


def test_eval_reports_its_mean_and_the_process_ends(mine, tiny_folder, tmp_path, capsys):
    command = ["eval", f"model.path={tiny_folder / 'base'}", f"data.files={tiny_folder / 'data' / 'eval.parquet'}"]
    command += [f"out={tmp_path / 'eval.json'}", "eval.limit=3", "eval.max_response_tokens=4"]
    command += [f"reward.function={mine}:length", "reward.replaces=reward"]
    with pytest.raises(SystemExit, match="0"):
        cli.app(command)
    assert 0 < json.loads((tmp_path / "eval.json").read_text())["accuracy"] < 1
    function = function_of(OwnReward(function=f"{mine}:length", replaces="reward"))
    process = function._process
    function.stop()
    assert process.returncode == -9 and not Path(f"/proc/{process.pid}").exists()


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("gone", "AttributeError: module 'mine' has no attribute 'gone'; give module:name"),
        ("nothing", "expected a number, got NoneType; correct"),
        ("word", "expected a number, got str; correct"),
        ("nan", "expected a finite number, got nan; correct"),
        ("tensor", "expected a number, got Tensor; correct"),
        ("raises", r"KeyError: 'a\nb'; correct"),
        ("leaves", "SystemExit: bye; correct"),
        ("killed", "its process ended by SIGKILL"),
        ("eats", "MemoryError; correct"),
        ("sleeps", "took more than 0.5 s; correct"),
    ],
)
def test_a_fault_ends_rlvr_in_one_line(name, fault, mine, tiny_folder, tmp_path):
    seconds = 0.05 if name == "sleeps" else 10
    tree = short(tiny_folder, tmp_path / "out", f"{mine}:{name}", seconds=seconds)
    with pytest.raises(DataError) as error:
        run_stage("rlvr", tree)
    assert fault in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "final").exists()


def test_a_function_that_forks_answers_once(mine, tiny_folder, tmp_path):
    run_stage("rlvr", short(tiny_folder, tmp_path / "out", f"{mine}:forks"))
    lines = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "reward" in line]
    assert lines and lines[0]["reward"] == 0.0
