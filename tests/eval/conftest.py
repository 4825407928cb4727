"""What tests with the real lmms-eval share: a tiny policy that answers, a task of its own, and the report, a file that
PRISM_REPORT names (make test-eval)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prism_fast.config import SFTConfig
from prism_fast.demo.digits import DemoSizes, write_demo_data
from prism_fast.stages.sft import sft
from tests.host_report import reported

TASKS = Path(__file__).parent / "tasks"
SCENES = 48


@pytest.fixture(scope="session")
def report():
    about = [";", f"a tiny Qwen3-VL after 100 steps of SFT, {SCENES} held-out scenes of digits, greedy, in fp32)."]
    yield from reported("test-eval", ("lmms-eval", "transformers", "datasets", "torch"), about)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """The demo's files; those of ``eval`` are held out."""
    return write_demo_data(tmp_path_factory.mktemp("scenes"), 0, DemoSizes(sft=2000, align=8, rlvr=8, eval=SCENES))


@pytest.fixture(scope="session")
def policy(tiny_folder, scenes, tmp_path_factory):
    """The folder of a policy that keeps the format and reads some scenes rightly."""
    out = tmp_path_factory.mktemp("sft")
    settings = {
        "model": {"path": tiny_folder / "base"},
        "data": {"files": [scenes.sft]},
        "optimizer": {"lr": 2e-3, "schedule": "cosine", "warmup_ratio": 0.1, "beta2": 0.95},
        "run": {"out": out, "tokens_per_pack": 4096, "threads": 1, "eval_every": 0},
        "steps": 100,
    }
    sft(SFTConfig.model_validate(settings))
    return out / "final" / "policy"


@pytest.fixture(scope="session")
def tasks(scenes, tmp_path_factory):
    """The folder of the tasks, which name the file of scenes."""
    folder = tmp_path_factory.mktemp("tasks")
    for file in TASKS.iterdir():
        if file.is_file():
            (folder / file.name).write_text(file.read_text().replace("DATA", str(scenes.eval)))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # some tasks cannot be imported without one; nobody is asked
