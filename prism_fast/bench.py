"""``prism-fast bench``: runs a benchmark of the clone that this package lies in. benchmarks/ is not installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from prism_fast.records import DataError

ROOT = Path(__file__).resolve().parent.parent


def run(arguments: Sequence[str]) -> int:
    """``python -m benchmarks ARGUMENTS`` in this process -> its exit status. Raises DataError without a clone."""
    if not (ROOT / "benchmarks" / "__main__.py").is_file():
        raise DataError(
            f"bench: {ROOT} holds no benchmarks/, which is not part of the installed package; run it from a clone "
            "(git clone, pip install -e ., prism-fast bench ...)"
        )
    # First on the path: the clone's benchmarks/ must win over anything installed under that name.
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    return importlib.import_module("benchmarks.__main__").main(arguments)
