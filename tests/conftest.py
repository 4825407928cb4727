"""What all tests share: fixtures, and marks that follow from where a test stands.

GPU tests skip, with a reason, where there is no GPU. Tests of a file that knows tests/oracle.py are ``numerical``: they
hold on every machine (make test-portable). Slow tests come first, so that no worker is left with one at the end.
"""

import os
from functools import cache
from pathlib import Path

import pytest
import torch

# Before CUDA starts: without it torch refuses matrix products under use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


ELSEWHERE = ("embed", "eval", "vllm")  # folders, and markers, of tests in environments of their own


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in ELSEWHERE:
            item.add_marker(folder)
        # By marker: keywords hold names of folders too, such as that of a clone.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
        if knows_the_oracle(item.module):
            item.add_marker(pytest.mark.numerical)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@cache
def knows_the_oracle(module):
    known = vars(module).values()
    return any("tests.oracle" in (getattr(it, "__module__", None), getattr(it, "__name__", None)) for it in known)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """data/, base/ and discriminator/ of a tiny run, which stages read (tests/tiny_run.py)."""
    from tests.tiny_run import prepare

    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished(tiny_folder, tmp_path_factory):
    """finished(stage) -> the folder of that stage's tiny run, of all its steps. Run once; a test that changes it copies
    it first. A test that asks for it puts torch's settings back (``torch_settings``)."""
    from tests.tiny_run import run_stage, settings

    @cache
    def run(stage):
        out = tmp_path_factory.mktemp("finished") / stage
        run_stage(stage, settings(tiny_folder, stage, out))
        return out

    return run


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def torch_settings():
    """Puts back what a stage sets for the process: threads and deterministic algorithms."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
