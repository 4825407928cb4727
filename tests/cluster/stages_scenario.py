"""Whole stages after one another in the same processes: imports cost more than tiny stages do.

python -m tests.cluster.stages_scenario FOLDER        reads FOLDER/runs.json: [[stage, configuration, resume], ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from prism_fast import ranks
from tests.tiny_run import run_stage


def main(folder: Path) -> None:
    with ranks.joined(timeout_minutes=2.0, alone="RANK" in os.environ):
        for stage, tree, resume in json.loads((folder / "runs.json").read_text()):
            run_stage(stage, tree, resume=resume)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
