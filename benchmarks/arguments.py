"""What the command lines of benchmarks share."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks import machine

RESULTS = Path(__file__).resolve().parent / "results"


class Parser(argparse.ArgumentParser):
    """Errors in one line: usage is what --help is for."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (see --help)\n")


def result_path(op: str, device: torch.device) -> Path:
    """Where ``--save`` writes: results/<device>/<date>-<commit>-<op>.json."""
    name = f"{time.strftime('%Y%m%d-%H%M', time.gmtime())}-{machine.commit().replace('+', '-dirty')}-{op}.json"
    return RESULTS / machine.slug(machine.device_name(device)) / name
