"""The laws of the house that can be read off the source (ARCHITECTURE.md, "Laws"), and its rooms (`dev/house.py`)."""

import ast
import os
import re
import subprocess
import sys

import pytest

from dev import house
from prism_kernels import dispatch

ROOT = house.ROOT
KERNELS = sorted((ROOT / "kernels" / "prism_kernels").rglob("*.py"))
TRAINER = sorted((ROOT / "prism_fast").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
SOURCES = [*KERNELS, *TRAINER]
# What stands below every room of the trainer; each of these files imports, of the trainer, others of them at most.
GROUND = {"records", "config", "settings", "files", "pack", "response_format", "metric_names", "ranks", "balance"}
INSIDES = re.compile(  # of transformers: model code, and the registries and masks that model code uses
    r"transformers\.(models\..*modeling_\w+|integrations|masking_utils|modeling_(?!rope)\w+|cache_utils|AttentionInterface"
    r"|AttentionMaskInterface|ExpertsInterface|ALL_\w+_FUNCTIONS|create_\w*mask)\b.*"
)
IMPLEMENTATIONS = re.compile(r"(reference|cpu|torch|sdpa|varlen|native|triton|cuda|flash)(_\w+)?")


def imported(path):
    """Modules that a file imports anywhere, in functions too."""
    return {name for _, name in house.imported(path)}


def importers(files, package):
    return {
        str(path.relative_to(ROOT))
        for path in files
        if any(name == package or name.startswith(f"{package}.") for name in imported(path))
    }


def test_the_files_that_the_laws_speak_of_are_found():
    found = {str(path.relative_to(ROOT)) for path in SOURCES}
    ops = ("linear_logprob", "group_advantage", "moe", "rms_norm", "sample_tokens", "swiglu", "tree_attention")
    ops = (*ops, "packing", "spans")
    assert {f"kernels/prism_kernels/{op}/{name}.py" for op in ops for name in ("api", "reference")} <= found
    assert {"prism_fast/records.py", "prism_fast/models/policy.py", "prism_fast/models/discriminator.py"} <= found
    assert len(list(jit_functions())) > 5
    assert "torch" in imported(ROOT / "kernels/prism_kernels/dispatch.py")


# ---- rooms and what they may know of each other


def rooms_imported_by(room):
    """Rooms of the trainer that ``room`` imports."""
    plan = house.Plan.of(ROOT / "prism_fast")
    assert room in plan.rooms
    return {target for source, target in plan.imports if source == room}


def test_rooms_imports_and_sizes_are_within_their_limits():
    done = subprocess.run([sys.executable, "dev/house.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_ground_imports_no_room_above():
    assert rooms_imported_by("response_format") == set()
    for room in GROUND & set(house.Plan.of(ROOT / "prism_fast").rooms):
        assert rooms_imported_by(room) <= GROUND, room


def test_the_run_kit_knows_no_model_no_kernel_no_data():
    assert rooms_imported_by("run") <= GROUND - {"pack", "response_format", "balance"}
    assert importers((ROOT / "prism_fast" / "run").rglob("*.py"), "prism_kernels") == set()


def test_a_benchmark_needs_steps_not_stages():
    assert importers(BENCHMARKS, "prism_fast") != set()
    assert importers(BENCHMARKS, "prism_fast.stages") == set()


def test_reading_a_file_needs_no_judge():
    assert "response_format" in rooms_imported_by("data") and "reward" not in rooms_imported_by("data")


def test_the_judge_has_one_door():
    inside = ROOT / "prism_fast" / "reward" / "answer"
    others = [path for path in [*TRAINER, *BENCHMARKS] if not path.is_relative_to(inside)]
    used = {name for path in others for name in imported(path) if name.startswith("prism_fast.reward.answer.")}
    assert used == {"prism_fast.reward.answer.is_right", "prism_fast.reward.answer.judge"}


EDITS_THE_PATH = re.compile(r"sys\.path(\[[^\]]*\])? *\+?=(?!=)|sys\.path\.(insert|append|extend)")


def test_what_ships_knows_nothing_of_what_does_not():
    for name in ("benchmarks", "tests", "dev"):
        assert importers(SOURCES, name) == set()
    for path in SOURCES:
        assert not EDITS_THE_PATH.search(path.read_text()), path


def test_an_op_lives_in_prism_kernels():
    for path in TRAINER:
        for node in ast.walk(house.tree_of(path)):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                assert not any(base.endswith("autograd.Function") for base in bases), f"{path}: {node.name}"
    assert "torch.autograd.Function" not in set().union(*(imported(path) for path in TRAINER))
    assert importers(TRAINER, "triton") == set()


def test_a_loss_is_a_formula():
    path = ROOT / "prism_fast" / "steps" / "pair_loss.py"
    packages = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert packages == {"torch"}


# ---- the laws of the kernels


def test_imports_go_from_the_trainer_to_the_kernels_to_the_extension():
    assert importers(KERNELS, "prism_fast") == set()
    assert importers([*KERNELS, *TRAINER], "prism_kernels._C") == {"kernels/prism_kernels/native.py"}


def test_prism_kernels_imports_with_torch_alone():
    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'pydantic', 'numpy', 'prism_kernels._C'): sys.modules[name] = None\n"
        "import prism_kernels\n"
        "assert {'moe_mlp', 'tree_attention', 'linear_policy_loss'} <= set(prism_kernels.which_impl())\n"
        "assert not any(name.split('.')[0] == 'prism_fast' for name in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_prism_kernels_loads_nothing_beyond_torch_triton_and_numpy():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import prism_kernels\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert {"prism_kernels"} <= set(done.stdout.split()) <= {"prism_kernels", "triton", "numpy"}, done.stderr


def test_names_that_shadow_other_packages_do_not_exist():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    taken = {"kernels", "triton", "types", "select"}
    assert [str(path) for path in [*KERNELS, *TRAINER] if path.stem in taken or path.parent.name in taken] == []


def test_only_the_named_files_touch_transformers_insides_deepspeed_vllm_and_trl():
    insides = {
        str(path.relative_to(ROOT)) for path in SOURCES if any(INSIDES.fullmatch(name) for name in imported(path))
    }
    assert "prism_fast/models/blocks.py" in insides
    integrations = {f"kernels/prism_kernels/integrations/transformers{part}.py" for part in ("", "_moe", "_tree")}
    assert {name for name in insides if not name.startswith("prism_fast/models/")} <= integrations
    assert importers(SOURCES, "deepspeed") == {"prism_fast/steps/update.py"}
    assert importers(SOURCES, "vllm") == {f"prism_fast/steps/{name}.py" for name in ("sampler_vllm", "vllm_worker")}
    assert importers(SOURCES, "prism_fast.steps.vllm_worker") == set()  # it is for vLLM's processes
    assert importers(TRAINER, "torch.distributed") == {"prism_fast/ranks.py"}
    assert importers(KERNELS, "transformers") <= integrations
    for host, file in {"trl": "trl", "verl": "verl", "swift": "ms_swift"}.items():
        assert importers(SOURCES, host) == {f"kernels/prism_kernels/integrations/{file}.py"}
    assert importers(SOURCES, "lmms_eval") == {"prism_fast/stages/lmms/inside.py"}


def test_the_extension_knows_pointers_not_torch():
    sources = sorted((ROOT / "csrc").iterdir())
    assert ROOT / "csrc" / "bindings.cpp" in sources
    included = {name for path in sources for name in re.findall(r"#include\s*[<\"](\S+)[>\"]", path.read_text())}
    assert {"pybind11/pybind11.h", "packing.h"} <= included
    assert not any(re.match(r"(torch|ATen|c10)/", name) for name in included)


def test_no_error_is_swallowed():
    """No bare except; one of Exception must raise or do something with it."""
    for path in SOURCES:
        for node in ast.walk(house.tree_of(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert node.type is not None, f"{place}: bare except"
            idle = all(isinstance(line, (ast.Pass, ast.Continue)) or is_constant(line) for line in node.body)
            broad = re.search(r"\b(Base)?Exception\b", ast.unparse(node.type))
            assert not (broad and idle), f"{place}: swallows {ast.unparse(node.type)}"


def is_constant(line):
    """A lone literal, or a return of one."""
    value = line.value if isinstance(line, (ast.Expr, ast.Return)) else line
    return value is None or isinstance(value, ast.Constant)


@pytest.mark.parametrize("op", sorted({path.parent for path in KERNELS if path.name == "api.py"}), ids=lambda p: p.name)
def test_implementations_do_not_import_each_other(op):
    """Files belong to an implementation by the op's table, and those beside them by their names."""
    matches = {path.stem: IMPLEMENTATIONS.fullmatch(path.stem) for path in op.glob("*.py")}
    families = {stem: match[1] for stem, match in matches.items() if match}
    for table in (found.table for found in dispatch._OPS.values()):
        for impl, row in table.items():
            package, _, stem = row.target.partition(":")[0].rpartition(".")
            if package == f"prism_kernels.{op.name}":
                assert families.get(stem, str(impl)) == str(impl), f"{op.name}/{stem}.py is of two implementations"
                families[stem] = str(impl)
    assert "reference" in families.values()
    for name, family in families.items():
        for module in imported(op / f"{name}.py"):
            other = module.removeprefix(f"prism_kernels.{op.name}.").split(".")[0]
            assert families.get(other, family) == family, f"{op.name}/{name}.py imports {other}.py"


def jit_functions():
    for path in KERNELS:
        for node in ast.walk(house.tree_of(path)):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield f"{path.parent.name}/{path.name}:{node.name}", node


@pytest.mark.parametrize(("name", "function"), [pytest.param(n, f, id=n) for n, f in jit_functions()])
def test_no_length_is_a_compile_time_constant_and_offsets_are_wide(name, function):
    """A length as constexpr compiles anew for every batch; 32k tokens x 152k words overflow int32."""
    for argument in function.args.args:
        if argument.annotation is not None and "constexpr" in ast.unparse(argument.annotation):
            assert not re.search(r"(?i)^[TRSBNVLHMI]$|len|seq|tokens|rows|words|vocab|num_", argument.arg), argument.arg
    wide, grew = set(), True
    while grew:  # names that hold int64, through assignments
        before = len(wide)
        for node in ast.walk(function):
            if isinstance(node, (ast.Assign, ast.AugAssign)) and is_wide(node.value, wide):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                wide |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        grew = len(wide) > before
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = [ast.unparse(side) for side in (node.left, node.right)]
            if any(re.fullmatch(r"\w*stride\w*", side) for side in sides):
                assert is_wide(node, wide), f"line {node.lineno}: {' * '.join(sides)} before a cast to int64"


def is_wide(node, wide):
    return "int64" in ast.unparse(node) or any(isinstance(n, ast.Name) and n.id in wide for n in ast.walk(node))
