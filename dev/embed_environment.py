"""Builds an environment in which prism_kernels runs inside another trainer on a CPU: what ``make test-embed`` runs in.

    python -m dev.embed_environment HOST FOLDER      makes a virtual environment there: some 3 minutes, 2 GB

Versions are pinned: the integrations replace names that are not public, and ``TESTED`` in each of them names these.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dev.environments import build

# By host: what pip resolves beside our own needs, and the modules that must import afterwards.
HOSTS = {
    "trl": (["trl==1.16.0", "transformers==5.24.0", "peft==0.20.0"], ["trl", "torchvision.transforms.v2.functional"]),
}


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in HOSTS:
        sys.exit(f"python -m dev.embed_environment HOST FOLDER, with HOST one of {', '.join(HOSTS)}")
    packages, modules = HOSTS[sys.argv[1]]
    build(Path(sys.argv[2]), packages, modules=modules)
