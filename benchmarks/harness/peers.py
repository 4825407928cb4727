"""Other libraries by name: how each is found. One that is not here raises Unavailable, and its row says so."""

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

from benchmarks.harness.machine import version
from benchmarks.harness.measure import Unavailable


def need_gpu(device: torch.device | None) -> None:
    if device is not None and device.type != "cuda":
        raise Unavailable("needs a GPU")


def need(module: str, package: str, gpu: torch.device | None = None, *, alone: bool = False) -> ModuleType:
    """Import ``module`` of a distribution. Unavailable: "not installed", "needs a GPU" where ``gpu`` is a device that
    is none, or what the module itself lacks.

    ``alone``: without running the parents' ``__init__``, some of which import a whole trainer for one kernel.
    """
    _need_installed(module, package)
    need_gpu(gpu)
    names = module.split(".")
    for depth in range(1, len(names) if alone else 0):
        parent = ".".join(names[:depth])
        if parent not in sys.modules:
            _import_bare(parent, package)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} {version(package)} does not import: {error}") from error


def _need_installed(module: str, package: str) -> None:
    top = module.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise Unavailable(f"not installed ({package})")


def _import_bare(name: str, package: str) -> None:
    """A package as a name and a path alone."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise Unavailable(f"{package} {version(package)} has no {name}")
    bare = ModuleType(name)
    bare.__path__ = list(spec.submodule_search_locations)
    bare.__spec__ = spec
    sys.modules[name] = bare


def needed(module: str, name: str, package: str, gpu: torch.device | None = None, *, alone: bool = False) -> Any:
    """As :func:`need`: one attribute of the module."""
    found = need(module, package, gpu, alone=alone)
    try:
        return getattr(found, name)
    except AttributeError:
        raise Unavailable(f"{package} {version(package)} has no {module}.{name}") from None


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
    body = ast.parse(path.read_text()).body if path.exists() else []
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.decorator_list = []
            code = compile(ast.Module([node], type_ignores=[]), str(path), "exec")
            values = dict(names)
            exec(code, values)
            return values[name]
    raise Unavailable(f"{package} {version(package)} has no {module}.{name}")
