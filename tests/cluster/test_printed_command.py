"""What `prism-fast launch` prints is run by a shell, on two CPU processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prism_fast.config import SFTConfig, load_config
from prism_fast.run.launch import Launch, command


@pytest.mark.slow
def test_the_printed_command_trains_and_only_the_first_process_speaks(tiny_folder, tmp_path):
    words = (
        "--config",
        "tiny_sft",
        f"model.path={tiny_folder / 'base'}",
        f"data.files={tiny_folder / 'data/sft.json'}",
    )
    words += ("steps=1", "epochs=null", "batch_size=4", "cluster.sharding=zero2", f"run.out={tmp_path / 'my run'}")
    assert load_config(SFTConfig, Path(words[1]), words[2:]).run.out == tmp_path / "my run"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", "-c", command(Launch("sft", words, gpus=2))],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == done.stdout.count("done: ") == done.stdout.count("loading ") == 1
    out = tmp_path / "my run"
    assert json.loads((out / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert (out / "final" / "policy" / "config.json").is_file()
