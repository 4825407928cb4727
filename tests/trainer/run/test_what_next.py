"""The commands that a stage names at its end lack no setting."""

import shlex
from pathlib import Path

import pytest

from prism_fast import config
from prism_fast.run.what_next import NEXT, after

CONFIGS = {
    "sft": config.SFTConfig,
    "upcycle": config.UpcycleConfig,
    "data pairs": config.PairsConfig,
    "warmup": config.WarmupConfig,
    "align": config.AlignConfig,
    "rlvr": config.RLVRConfig,
    "eval": config.EvaluateConfig,
}


@pytest.mark.parametrize("family", ["", "align_8b", "tiny_align"])
@pytest.mark.parametrize("stage", NEXT)
def test_what_comes_next_can_be_run_as_it_is_written(stage, family):
    lines = [*after(stage, Path("runs/a b"), family)]
    for line in lines:
        program, *words = shlex.split(line)
        command, (recipe, *overrides) = " ".join(words[: words.index("--config")]), words[words.index("--config") + 1 :]
        config.load_config(CONFIGS[command], Path(recipe), overrides)
        assert program == "prism-fast" and (command == "upcycle" or any("runs/a b" in each for each in overrides))
