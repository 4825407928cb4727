"""What tests inside other trainers share: a tiny model, and the report, a file that PRISM_REPORT names."""

from __future__ import annotations

import pytest
import torch

from tests.host_report import reported

try:
    import trl  # noqa: F401
except ImportError:  # where these tests are deselected, after they were imported
    collect_ignore = ["test_cost.py", "test_docs.py", "test_openrlhf.py", "test_prism.py", "test_trl.py"]
    collect_ignore += ["test_trl_trainers.py"]


@pytest.fixture(scope="session")
def report():
    yield from reported("test-embed", ("trl", "transformers", "accelerate", "torch"), [")."])


@pytest.fixture(scope="session")
def base(tiny_folder):
    return tiny_folder / "base"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
