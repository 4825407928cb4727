"""benchmarks/ as rooms: a folder, or a file directly under the package; which imports which."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from benchmarks import catalog

ROOT = Path(catalog.__file__).parent


def room(name):
    """benchmarks.ops.moe.bench -> ops"""
    return name.split(".")[1]


def imported(path):
    """The rooms that a file imports, wherever in it the import stands; the catalog loads what its rows name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
            yield room(node.module)
        elif isinstance(node, ast.Import):
            yield from (room(alias.name) for alias in node.names if alias.name.startswith("benchmarks."))
    if path == ROOT / "catalog.py":
        yield from (room(f"benchmarks.{entry.module}") for entry in catalog.CATALOG.values())


def test_rooms_are_few_and_their_imports_go_one_way():
    files = {path: path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    rooms = {name: set() for name in files.values() if name != "__init__"}
    for path, name in files.items():
        if name != "__init__":
            rooms[name] |= set(imported(path)) - {name}
    assert len(rooms) <= 7, sorted(rooms)
    assert sum(map(len, rooms.values())) <= 14, rooms
    list(TopologicalSorter(rooms).static_order())  # raises CycleError


def test_every_op_has_a_row_and_every_row_its_tests():
    folders = {path.parent.name for path in ROOT.glob("ops/*/bench.py")}
    rows = {entry.module.split(".")[1] for entry in catalog.CATALOG.values() if entry.module.startswith("ops.")}
    assert rows == folders
    for op, entry in catalog.CATALOG.items():
        assert catalog.load(op).op == op
        assert (ROOT.parent / entry.tests).is_dir() and bool(entry.tests) == entry.module.startswith("ops.")
