"""dev/house.py on planted packages: what it must see, and what it must let pass."""

import ast
import subprocess
import sys

import pytest

from dev import house


def plant(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_rooms_and_imports(tmp_path):
    files = {
        "shop/__init__.py": '"""A shop."""',
        "shop/till.py": "import os\nfrom shop import shelf\nimport other.till",
        "shop/shelf/__init__.py": "",
        "shop/shelf/fruit.py": "from shop.shelf import bread\nfrom . import bread\nfrom ..door.bell import ring",
        "shop/shelf/bread.py": "def late():\n    import shop.door.bell as b\n    return b",
        "shop/door/bell.py": "import importlib\nkey = importlib.import_module('shop.key')",
        "shop/key.py": "from shop.missing import x",
    }
    plan = house.Plan.of(plant(tmp_path, files) / "shop")
    assert plan.rooms == ("door", "key", "shelf", "till")
    assert plan.imports == {
        ("door", "key"): ("shop/door/bell.py:2",),
        ("shelf", "door"): ("shop/shelf/bread.py:2", "shop/shelf/fruit.py:3"),
        ("till", "shelf"): ("shop/till.py:2",),
    }
    assert plan.circles() == []
    busy = plant(tmp_path / "other", {**files, "shop/__init__.py": "from shop import key"})
    assert "__init__" in house.Plan.of(busy / "shop").rooms


def test_circles(tmp_path):
    files = {"p/a.py": "import p.b", "p/b/x.py": "import p.c", "p/c.py": "from p import a", "p/d.py": "import p.a"}
    plan = house.Plan.of(plant(tmp_path, files) / "p")
    assert plan.circles() == [("a", "b", "c")]


ARGUMENTS = "a, b, c, d, e, f, g, h, i"
NINE = f"({ARGUMENTS}): ..."
LINE = "    x = 1\n"
TEXT = '    """Text\n    of\n    lines."""\n'
CODE = {
    "prism_fast/stages/sft.py": "x = 1\n" * 131,
    "prism_fast/stages/rlvr.py": "x = 1\n" * 130,
    "prism_fast/long.py": f"def exact():\n{TEXT}{LINE * 59}\n\ndef long():\n{LINE * 60}",
    "prism_fast/wide.py": f"class A:\n    def f(self, a, b, c, d, /, e, *g, h, **i): ...\n    def nine{NINE}",
    "prism_fast/cli.py": f"@app.command()\ndef nine{NINE}",
    "kernels/prism_kernels/op/api.py": f"def nine{NINE}",
    "kernels/prism_kernels/api.py": f"def nine{NINE}",
    "kernels/prism_kernels/op/triton_kernel.py": f"@triton.jit\ndef kernel({ARGUMENTS}):\n{LINE * 99}",
}


def test_what_has_grown_too_large(tmp_path):
    plant(tmp_path, CODE)
    assert house.long_stages(tmp_path) == ["prism_fast/stages/sft.py: 131 lines, at most 130 for a stage"]
    assert house.large_functions(tmp_path) == [
        "prism_fast/long.py:66: long: 61 lines, at most 60",
        "prism_fast/wide.py:3: nine: 9 parameters, at most 8",
        "kernels/prism_kernels/api.py:1: nine: 9 parameters, at most 8",
    ]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, None),
        ({"prism_fast/b.py": "import prism_fast.a", "prism_fast/a.py": "import prism_fast.b"}, "of imports: a, b"),
        ({f"benchmarks/r{i}.py": "" for i in range(8)}, "benchmarks: 8 rooms, at most "),
        ({f"prism_fast/r{i}.py": "import sys" + "".join(f", prism_fast.r{j}" for j in range(i)) for i in range(14)},
         "prism_fast: 91 imports between rooms, at most "),
    ],
)  # fmt: skip
def test_exit_status_says_whether_a_limit_is_broken(tmp_path, files, said):
    command = [sys.executable, house.__file__, str(plant(tmp_path, {"prism_fast/x.py": "", **files}))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (said is not None), done.stderr
    assert (said is None) == ("broken:" not in done.stdout) and (said or "") in done.stdout


def test_parameters_and_decorators():
    (function,) = ast.parse("@pkg.jit\n@app.command('x')\ndef f(cls, a, *, b): ...").body
    assert (
        house.parameters_of(function) == 2 and house.decorated(function, "jit") and house.decorated(function, "command")
    )
    assert not house.decorated(function, "app", "x")
