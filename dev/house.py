"""The plan of the house, read off the source: rooms, the imports between them, circles, and what has grown too large.

    python dev/house.py [ROOT]      exit status 1, and the list, where a limit is broken

A room is a folder, or a file directly under a package; an import is an ordered pair of rooms, wherever in a file it
stands (in functions and under TYPE_CHECKING too). A package's own __init__.py is a room only where it imports one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"prism_fast": (19, 70), "benchmarks": (7, 14)}  # package -> rooms, imports between them
STAGE_LINES = 130
FUNCTION_LINES = 60  # from def to the last line, its docstring left out
PARAMETERS = 8  # self and cls left out
CODE = ("prism_fast", "kernels/prism_kernels", "benchmarks", "tests", "dev")  # whose functions are measured
# Contract files spell an op's arguments: the contract, its definition, its autograd function, and the float64 oracle of
# the tests. In them, in Triton kernels and in commands of the command line, an interface decides how many there are.
CONTRACT_FILES = re.compile(r"kernels/prism_kernels/\w+/(api|reference|autograd)\.py|tests/oracle\.py")


@dataclass(frozen=True)
class Plan:
    """Rooms of one package and what they import of each other.

    >>> Plan.of(ROOT / "prism_fast").imports
    {('cli', 'config'): ('prism_fast/cli/common.py:19',), ('cli', 'data'): ...}
    """

    rooms: tuple[str, ...]
    imports: dict[tuple[str, str], tuple[str, ...]]  # (importer, imported) -> places

    @classmethod
    def of(cls, package: Path) -> Plan:
        files = {path: _room(path, package) for path in sorted(package.rglob("*.py"))}
        rooms = set(files.values())
        places: dict[tuple[str, str], list[str]] = {}
        for path, room in files.items():
            for line, module in imported(path, package.parent):
                parts = module.split(".")
                if parts[0] != package.name or len(parts) == 1 or parts[1] not in rooms or parts[1] == room:
                    continue
                place = f"{path.relative_to(package.parent)}:{line}"
                places.setdefault((room, parts[1]), []).append(place)
        if not any("__init__" in pair for pair in places):
            rooms.discard("__init__")
        return cls(tuple(sorted(rooms)), {pair: tuple(dict.fromkeys(places[pair])) for pair in sorted(places)})

    def circles(self) -> list[tuple[str, ...]]:
        """Sets of rooms that reach each other by imports."""
        reached = {room: self._reached(room) for room in self.rooms}
        groups = {tuple(sorted(o for o in self.rooms if o in reached[r] and r in reached[o])) for r in self.rooms}
        return sorted(group for group in groups if group)

    def _reached(self, room: str) -> set[str]:
        found, new = set(), {room}
        while new:
            new = {target for source, target in self.imports if source in new} - found
            found |= new
        return found


def _room(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imported(path: Path, root: Path = ROOT) -> tuple[tuple[int, str], ...]:
    """(line, module or module.name) of everything that a file imports; import_module("a.b") counts too.

    ``root`` is the folder from which the file's own module name is read, for relative imports.
    """
    package = path.relative_to(root).parts[:-1]
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            found += [(node.lineno, name) for name in (module, *(f"{module}.{alias.name}" for alias in node.names))]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            found += [
                (node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
    return tuple(found)


def functions(root: Path = ROOT) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(file, function) of all the code, methods and functions within functions too."""
    for folder in CODE:
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(tree_of(path)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield str(path.relative_to(root)), node


def decorated(function: ast.FunctionDef | ast.AsyncFunctionDef, *words: str) -> bool:
    """Whether a decorator's name ends in one of ``words``: "jit" for triton.jit, "command" for app.command(...)."""
    names = [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list]
    return any(name.split(".")[-1] in words for name in names)


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    text = first.end_lineno - first.lineno + 1 if ast.get_docstring(function, clean=False) is not None else 0
    return function.end_lineno - function.lineno + 1 - text


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def long_stages(root: Path = ROOT) -> list[str]:
    found = []
    for path in sorted((root / "prism_fast" / "stages").glob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > STAGE_LINES:
            found.append(f"{path.relative_to(root)}: {lines} lines, at most {STAGE_LINES} for a stage")
    return found


def large_functions(root: Path = ROOT) -> list[str]:
    found = []
    for file, function in functions(root):
        if decorated(function, "jit", "autotune", "heuristics"):
            continue
        place = f"{file}:{function.lineno}: {function.name}"
        if (lines := lines_of(function)) > FUNCTION_LINES:
            found.append(f"{place}: {lines} lines, at most {FUNCTION_LINES}")
        contract = CONTRACT_FILES.fullmatch(file) or decorated(function, "command")
        if (count := parameters_of(function)) > PARAMETERS and not contract:
            found.append(f"{place}: {count} parameters, at most {PARAMETERS}")
    return found


def broken_plans(root: Path = ROOT) -> list[str]:
    found = []
    for name, (rooms, imports) in LIMITS.items():
        plan = Plan.of(root / name)
        if len(plan.rooms) > rooms:
            found.append(f"{name}: {len(plan.rooms)} rooms, at most {rooms}")
        if len(plan.imports) > imports:
            found.append(f"{name}: {len(plan.imports)} imports between rooms, at most {imports}")
        found += [f"{name}: a circle of imports: {', '.join(circle)}" for circle in plan.circles()]
    return found


def main(root: Path = ROOT) -> int:
    for name in LIMITS:
        plan = Plan.of(root / name)
        print(f"{name}: {len(plan.rooms)} rooms, {len(plan.imports)} imports, {len(plan.circles())} circles")
        for room in plan.rooms:
            print(f"  {room:16} -> {', '.join(target for source, target in plan.imports if source == room) or '-'}")
        for circle in plan.circles():
            print(f"  circle: {', '.join(circle)}")
            for (source, target), places in plan.imports.items():
                if source in circle and target in circle:
                    print(f"    {source} -> {target}: {', '.join(places)}")
    broken = [*broken_plans(root), *long_stages(root), *large_functions(root)]
    for line in broken:
        print(f"broken: {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT))
