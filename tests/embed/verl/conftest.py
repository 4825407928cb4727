"""What tests inside verl share: the report, verl's queue. Importing verl is what loads the plugin."""

from __future__ import annotations

import pytest

from tests.host_report import installed, reported

collect_ignore_glob = [] if installed("verl") else ["test_*.py"]


@pytest.fixture(scope="session")
def report():
    about = [").", "verl is installed without its dependencies, and beside them what its imports need of these."]
    yield from reported("test-embed", ("verl", "transformers", "ray", "tensordict", "torch"), about)


@pytest.fixture(scope="session")
def queue():
    """verl's queue over Ray, of which each actor takes a CPU."""
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf

    for attempts_left in (3, 2, 1, 0):  # it gives itself 30 seconds to start, on a machine that others use too
        try:
            ray.init(num_cpus=16, include_dashboard=False, logging_level="ERROR", object_store_memory=80 * 2**20)
            break
        except Exception:  # ray raises a bare one where its node is slow to start
            ray.shutdown()
            if not attempts_left:
                raise
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    yield
    tq.close()
    ray.shutdown()
