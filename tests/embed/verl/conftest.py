"""What tests inside verl share: the report. Importing verl is what loads the plugin."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.host_report import reported

collect_ignore_glob = [] if find_spec("verl") else ["test_*.py"]


@pytest.fixture(scope="session")
def report():
    about = [").", "verl is installed without its dependencies, and beside them what its imports need of these."]
    yield from reported("test-embed", ("verl", "transformers", "ray", "tensordict", "torch"), about)
