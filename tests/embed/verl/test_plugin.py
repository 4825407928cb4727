"""How verl loads the plugin, in processes of its own: its entry point, and what becomes of an error in it."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

FOUND = """
from verl.utils.experimental.torch_functional import FusedLinearForPPO
print("FOUND", FusedLinearForPPO.__module__)
"""
OTHER_VERSION = """
import importlib.metadata as metadata
real = metadata.version
metadata.version = lambda package: "0.10.0" if package == "verl" else real(package)
"""


def process(code, **variables):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=300)


def test_the_entry_point_is_this_module():
    (found,) = entry_points(group="verl.plugins", name="prism")
    assert found.value == "prism_kernels.integrations.verl"


@pytest.mark.parametrize(
    ("variables", "module"),
    [
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, "verl.utils.experimental.torch_functional"),
        (
            {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "prism_kernels.integrations.verl"},
            "prism_kernels.integrations.verl",
        ),
    ],
)
def test_by_name_or_not_at_all(variables, module):
    done = process(f"import verl\n{FOUND}", **variables)
    assert done.returncode == 0 and f"FOUND {module}\n" in done.stdout, done.stderr[-2000:]
    assert ("prism_kernels' in this process" in done.stderr) == module.startswith("prism")


def test_an_error_of_the_entry_point_ends_the_process_with_a_line(report):
    """verl itself would log it at DEBUG and train without."""
    done = process(f"{OTHER_VERSION}\nimport verl\n{FOUND}")
    line = done.stderr.strip().splitlines()[-1]
    report.add("another version of verl, by entry point: import verl", f"exit {done.returncode}, {line}", "a line")
    assert done.returncode == 1 and "FOUND" not in done.stdout
    assert line.startswith("prism_kernels.integrations.verl: verl 0.10.0: tested with 0.9.1;")
    assert line.endswith("VERL_USE_EXTERNAL_PLUGINS=none to go without")


def test_importing_it_before_verl_does_the_same():
    done = process(f"import prism_kernels.integrations.verl\nimport verl\n{FOUND}")
    assert done.returncode == 0 and "FOUND prism_kernels.integrations.verl\n" in done.stdout, done.stderr[-2000:]
