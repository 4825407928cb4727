"""What tests inside ms-swift share: the report."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.host_report import reported

collect_ignore_glob = [] if find_spec("swift") else ["test_*.py"]


@pytest.fixture(scope="session")
def report():
    about = [").", "ms-swift's own command, rollouts by transformers; the served discriminator in the same process."]
    yield from reported("test-embed, ms-swift", ("ms-swift", "transformers", "trl", "peft", "torch"), about)
