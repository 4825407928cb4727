"""Builds an environment in which prism_fast runs lmms-eval on a CPU: what ``make test-eval`` runs in.

    python -m dev.eval_environment FOLDER      makes a virtual environment there: some 4 minutes, 2.5 GB

The versions are those of the extra ``eval``, and of transformers: prism_fast/stages/lmms/inside.py uses names of
lmms-eval that are not public.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dev.environments import TORCHVISION, build, extra

TRANSFORMERS = "transformers==5.24.0"
MODULES = ("torchvision.transforms.v2.functional", "decord", "lmms_eval.evaluator")

if __name__ == "__main__":
    # lmms-eval asks for a torchvision, and pip would take the newest, with its own torch.
    build(Path(sys.argv[1]), [*extra("eval"), TRANSFORMERS, TORCHVISION], modules=MODULES)
