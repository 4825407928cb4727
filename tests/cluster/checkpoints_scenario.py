"""A stage whose last process cannot write a checkpoint as it should.

python -m tests.cluster.checkpoints_scenario HOW STAGE CONFIGURATION

HOW: "full", its disk is; "killed", while it writes the checkpoint of step 4.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

from prism_fast import ranks
from prism_fast.run import checkpoint
from tests.tiny_run import run_stage


def main(how: str, stage: str, tree: str) -> None:
    with ranks.joined(timeout_minutes=1.0):
        if ranks.rank() == ranks.world() - 1 and how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if ranks.rank() == ranks.world() - 1 and how == "killed":
            checkpoint.Part.write = killed(checkpoint.Part.write)
        run_stage(stage, json.loads(tree), resume=True)


def killed(write):
    def write_or_die(part: checkpoint.Part, folder: Path) -> checkpoint.Files:
        found = write(part, folder)
        if part.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return write_or_die


if __name__ == "__main__":
    main(*sys.argv[1:])
