"""Peers by name: how each is found. One that is not here raises Unavailable, and its row says so."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

from benchmarks.machine import version
from benchmarks.measure import Unavailable


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("needs a GPU")


def _need_installed(module: str, package: str) -> None:
    top = module.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise Unavailable(f"not installed ({package})")


def need(module: str, package: str, gpu: torch.device | None = None) -> ModuleType:
    """Import ``module`` of a distribution. Unavailable: "not installed", "needs a GPU" where ``gpu`` is a device that
    is none, or what the module itself lacks."""
    _need_installed(module, package)
    if gpu is not None:
        need_gpu(gpu)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} {version(package)} does not import: {error}") from error


def need_alone(module: str, package: str, gpu: torch.device | None = None) -> ModuleType:
    """As :func:`need` without running the parents' ``__init__``: some import a whole trainer for one kernel."""
    _need_installed(module, package)
    if gpu is not None:
        need_gpu(gpu)
    names = module.split(".")
    for depth in range(1, len(names)):
        parent = ".".join(names[:depth])
        if parent in sys.modules:
            continue
        spec = importlib.util.find_spec(parent)
        if spec is None or spec.submodule_search_locations is None:
            raise Unavailable(f"{package} {version(package)} has no {parent}")
        bare = ModuleType(parent)
        bare.__path__ = list(spec.submodule_search_locations)
        bare.__spec__ = spec
        sys.modules[parent] = bare
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} {version(package)} does not import: {error}") from error


def attribute(module: ModuleType, name: str, package: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise Unavailable(f"{package} {version(package)} has no {module.__name__}.{name}") from None
