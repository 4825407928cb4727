"""What tests inside other trainers share: a tiny model, and the report, a file that PRISM_REPORT names."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

try:
    import trl  # noqa: F401
except ImportError:  # where these tests are deselected, after they were imported
    collect_ignore = ["test_cost.py", "test_prism.py", "test_trl.py"]


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.embed)


@dataclass
class Report:
    """Rows of a table: what was looked at, how it came out, the limit."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, what: str, found: str, expected: str) -> None:
        self.rows.append((what, found, expected))

    def write(self, path: Path) -> None:
        versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "accelerate", "torch"))
        lines = [
            "# make test-embed",
            "",
            f"`make test-embed` (Python {platform.python_version()}, {versions}; no GPU).",
            "",
            "| what | found | limit |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in self.rows),
            "",
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))


@pytest.fixture(scope="session")
def report():
    kept = Report()
    yield kept
    if os.environ.get("PRISM_REPORT"):
        kept.write(Path(os.environ["PRISM_REPORT"]))


@pytest.fixture(scope="session")
def base(tiny_folder):
    return tiny_folder / "base"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
