"""What tests inside verl share: the report. Importing verl is what loads the plugin."""

from __future__ import annotations

import pytest

from tests.host_report import installed, reported

collect_ignore_glob = [] if installed("verl") else ["test_*.py"]


@pytest.fixture(scope="session")
def report():
    about = [").", "verl is installed without its dependencies, and beside them what its imports need of these."]
    yield from reported("test-embed", ("verl", "transformers", "ray", "tensordict", "torch"), about)
