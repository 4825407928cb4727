"""Peers by name: how each is found. One that is not here raises Unavailable, and its row says so."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
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


def stand_in(module: str, **attributes: Any) -> None:
    """Where ``module`` does not import, a module of that name with these attributes takes its place."""
    try:
        importlib.import_module(module)
    except ImportError:
        bare = ModuleType(module)
        vars(bare).update(attributes)
        sys.modules[module] = bare


def function_alone(module: str, name: str, package: str, **names: Any) -> Callable[..., Any]:
    """One function out of a module whose imports may be missing: its source, without decorators, run with ``names``.

    For functions that use nothing of their module but those names.
    """
    _need_installed(module, package)
    top, *rest = module.split(".")
    folder = importlib.util.find_spec(top).submodule_search_locations[0]
    path = Path(folder, *rest).with_suffix(".py")
    if not path.exists():
        raise Unavailable(f"{package} {version(package)} has no {module}")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.decorator_list = []
            code = compile(ast.Module([node], type_ignores=[]), str(path), "exec")
            values = dict(names)
            exec(code, values)
            return values[name]
    raise Unavailable(f"{package} {version(package)} has no {module}.{name}")


def attribute(module: ModuleType, name: str, package: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise Unavailable(f"{package} {version(package)} has no {module.__name__}.{name}") from None
