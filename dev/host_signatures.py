"""Reads what the integrations replace off the hosts' wheels: tests/kernels/integrations/host_signatures.json.

    python dev/host_signatures.py [WHEEL ...]      downloads the pinned wheels that are not given

The tests hold the integrations against this table, so that they need no host; `make test-embed` runs them inside one.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "integrations" / "host_signatures.json"

# By wheel: file -> functions, as CLASS.NAME or NAME, whose parameters count; "as NAME" for a name that a file imports
# by that name, "import NAME" for one that it imports, wherever in the file.
WANTED = {
    "trl==1.16.0": {
        "trl/kernels/chunked_logprob.py": ["ChunkedLogProbFunction.forward"],
        "trl/trainer/utils.py": ["as _ChunkedLogProbFunction"],
        "trl/trainer/grpo_trainer.py": [
            "GRPOTrainer._calculate_rewards",
            "GRPOTrainer._generate_and_score_completions",
        ],
    },
    "verl==0.9.1": {
        "verl/utils/experimental/torch_functional.py": ["FusedLinearForPPO.__init__", "FusedLinearForPPO.forward"],
        "verl/trainer/ppo/core_algos.py": [
            "compute_grpo_outcome_advantage",
            "compute_gdpo_outcome_advantage",
            "register_adv_est",
        ],
        "verl/trainer/ppo/v1/trainer_base.py": [
            "PPOTrainer.__init__",
            "PPOTrainer._compute_advantage",
            "PPOTrainer._save_checkpoint",
            "PPOTrainer._load_checkpoint",
            "register_trainer",
        ],
        "verl/models/transformers/qwen3_vl.py": ["import FusedLinearForPPO"],
        "verl/models/transformers/dense_common.py": ["import FusedLinearForPPO"],
    },
    "ms-swift==4.6.0": {
        "swift/rlhf_trainers/grpo_trainer.py": [
            "GRPOTrainer._get_logps_via_local_forward",
            "GRPOTrainer._compute_advantages",
        ],
        "swift/rl_core/advantage.py": ["compute_advantages"],
        "swift/rewards/orm.py": ["ORM.__init__"],
    },
    "openrlhf==0.11.2": {
        "openrlhf-0.11.2.data/purelib/openrlhf/utils/agent.py": ["SingleTurnAgentExecutor._fetch_rewards_via_func"],
    },
}


def signature(tree: ast.Module, name: str) -> list[str]:
    """Names of a function's parameters, or of the module's that a name is imported from. Raises LookupError."""
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if name in (f"as {alias.asname}", f"import {alias.name}"):
                return [f"{'.' * node.level}{node.module}.{alias.name}"]
    owner, _, function = name.rpartition(".")
    owners = [tree] if not owner else [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner]
    for node in owners:
        for item in node.body:
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and item.name == function:
                return [a.arg for a in (*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs)]
    raise LookupError(name)


def read(wheel: Path, wanted: dict[str, list[str]]) -> dict[str, list[str]]:
    with zipfile.ZipFile(wheel) as opened:
        trees = {file: ast.parse(opened.read(file)) for file in wanted}
    return {f"{file}: {name}": signature(trees[file], name) for file, names in wanted.items() for name in names}


def main(given: list[str]) -> None:
    table = {}
    with tempfile.TemporaryDirectory() as place:
        for package, wanted in WANTED.items():
            stem = package.replace("-", "_").replace("==", "-")
            wheels = [Path(path) for path in given if Path(path).name.startswith(f"{stem}-")]
            if not wheels:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, package]
                subprocess.run(pip, check=True)
                wheels = list(Path(place).glob(f"{stem}-*.whl"))
            table[package] = read(wheels[0], wanted)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
