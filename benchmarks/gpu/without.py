"""A dry run without packages that are installed here: what a GPU machine lacks is not found, but in the folder of
installed wheels. A ``sitecustomize`` there, which Python runs at its start, sees to it in every process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CODE = """\
import sys
from importlib.machinery import PathFinder

BLOCKED, HERE = {blocked!r}, {here!r}


class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in BLOCKED:
            return None
        found = PathFinder.find_spec(name, [HERE], target)
        if found is None:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return found


sys.meta_path.insert(0, Without)
"""


def block(modules: Sequence[str], folder: Path) -> None:
    """From now on processes with ``folder`` first on PYTHONPATH import these modules from there, or not at all."""
    (folder / "sitecustomize.py").write_text(CODE.format(blocked=set(modules), here=str(folder)))
