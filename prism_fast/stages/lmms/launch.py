"""`prism-fast eval --lmms`: lmms-eval in a process of its own for each policy, and what it found.

OUT/POLICY has TASK.json for every task that is finished, which is not run again; what lmms-eval says in lmms-eval.log;
and its cache of responses, behind which an interrupted task goes on where responses are the most probable tokens.
Settings go over in a file, not by a shell or a command line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prism_fast.config import BenchmarksConfig
from prism_fast.files import write_json
from prism_fast.models.backbone import local_directory
from prism_fast.models.load import open_chat
from prism_fast.records import DataError
from prism_fast.run import record
from prism_fast.run.environment import version
from prism_fast.run.lock import FolderLock
from prism_fast.stages.lmms.benchmarks import BENCHMARKS, LMMS_EVAL

INSIDE = ("-m", "prism_fast.stages.lmms.inside")
LOG, JOB = "lmms-eval.log", "job.json"
# Settings on which no figure depends but by rounding.
FREE = ("policies", "out", "batch_size", "processes", "vllm")
# By API_TYPE, the key without which lmms-eval counts as wrong whatever a language model would have to judge.
JUDGES = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}
ADVICE = "and, for a server of your own, OPENAI_API_URL and MODEL_VERSION; or --lmms paper-rules, which needs none"

Say = Callable[[str], None]


class Found(NamedTuple):
    """A policy as it was given, and its tasks' TASK.json."""

    policy: str
    tasks: dict[str, dict[str, Any]]


def evaluate_on(
    config: BenchmarksConfig,
    tasks: Sequence[str],
    *,
    say: Say = print,
    start: Sequence[str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[Found]:
    """Runs what is not finished of ``tasks`` on every policy. Raises DataError before the first where a package, a key
    or a policy is missing, and where lmms-eval ends with a fault."""
    _check_installed()
    _check_judge(tasks, environment)
    policies = [_Policy.of(path, config) for path in config.policies]
    labels = [policy.label for policy in policies]
    for label in labels:
        if labels.count(label) > 1:
            same = " and ".join(policy.given for policy in policies if policy.label == label)
            raise DataError(f"policies: {same} would both be kept in {config.out / label}; evaluate one elsewhere")
    return [_evaluate(policy, config, tasks, say, (start or INSIDE, environment)) for policy in policies]


class _Policy(NamedTuple):
    given: str
    folder: Path
    label: str
    asked: dict[str, Any]  # what figures depend on

    @classmethod
    def of(cls, path: Path, config: BenchmarksConfig) -> _Policy:
        folder = local_directory(path)
        open_chat(folder, "qwen3_vl")
        _refuse_code(folder)
        settings = config.model_dump(mode="json", exclude={*FREE, "include"})
        files = sorted(file for pattern in record.MODEL_FILES for file in folder.glob(pattern) if file.is_file())
        asked = {
            "lmms_eval": LMMS_EVAL,
            "settings": settings,
            "policy": {file.name: record.fingerprint(file)["sha256"] for file in files},
            "include": _tasks_of_their_own(config.include),
        }
        return cls(str(path), folder, re.sub(r"[^\w.-]+", "-", str(path)).strip("-.") or "policy", asked)


def _tasks_of_their_own(include: Path | None) -> dict[str, str]:
    if include is None:
        return {}
    if not include.is_dir():
        raise DataError(f"{include}: no such folder; expected tasks in lmms-eval's format: include=FOLDER")
    files = sorted(file for pattern in ("*.yaml", "*.py", "_*") for file in include.rglob(pattern) if file.is_file())
    return {str(file.relative_to(include)): record.fingerprint(file)["sha256"] for file in files}


def _refuse_code(folder: Path) -> None:
    """lmms-eval lets transformers run what a model's folder names as its code."""
    for file in sorted(folder.glob("*.json")):
        if '"auto_map"' in file.read_text(encoding="utf-8", errors="replace"):
            raise DataError(f"{file}: auto_map names code to run, and no model's code is run here; remove the key")


def _check_installed() -> None:
    found = version("lmms-eval")
    if found is None:
        raise DataError("eval --lmms: lmms-eval is not installed; pip install 'prism-fast[eval]'")
    if found != LMMS_EVAL:
        raise DataError(
            f"eval --lmms: lmms-eval {found} is installed, tested is {LMMS_EVAL}; pip install 'lmms-eval=={LMMS_EVAL}'"
        )


def _check_judge(tasks: Sequence[str], environment: Mapping[str, str]) -> None:
    judged = [benchmark for benchmark in BENCHMARKS if benchmark.judged and benchmark.task in tasks]
    key = JUDGES.get(environment.get("API_TYPE", "openai"))
    if judged and key and not environment.get(key):
        names = ", ".join(benchmark.task for benchmark in judged)
        raise DataError(f"--lmms: {names}: a language model judges the answers; set {key} {ADVICE}")


def _evaluate(
    policy: _Policy,
    config: BenchmarksConfig,
    tasks: Sequence[str],
    say: Say,
    how: tuple[Sequence[str], Mapping[str, str]],
) -> Found:
    out = config.out / policy.label
    with FolderLock(out, "out"):
        left = [task for task in tasks if _finished(out, task, policy.asked) is None]
        if len(left) < len(tasks):
            say(f"{policy.given}: finished already: {', '.join(task for task in tasks if task not in left)}")
        if left:
            say(f"{policy.given}: lmms-eval runs {', '.join(left)}; it writes to {out / LOG}")
            write_json(out / JOB, _job(policy, config, left, out), indent=1)
            _run(out, config, say, *how)
        found = {task: _finished(out, task, policy.asked) for task in tasks}
    missing = [task for task, result in found.items() if result is None]
    if missing:
        raise DataError(f"{policy.given}: lmms-eval ended without figures for {', '.join(missing)}; see {out / LOG}")
    return Found(policy.given, {task: result for task, result in found.items() if result is not None})


def _job(policy: _Policy, config: BenchmarksConfig, tasks: Sequence[str], out: Path) -> dict[str, Any]:
    identity = hashlib.sha256(json.dumps(policy.asked, sort_keys=True).encode()).hexdigest()
    settings = config.model_dump(mode="json", exclude={"policies", "out", "include"})
    return {
        **settings,
        "policy": str(policy.folder.absolute()),
        "identity": identity,
        "include": None if config.include is None else str(config.include.absolute()),
        "tasks": list(tasks),
        "out": str(out.absolute()),
        "asked": policy.asked,
        "lmms_eval": LMMS_EVAL,
    }


def _finished(out: Path, task: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """TASK.json; None where the task is not finished. Raises DataError where it is of something else."""
    file = out / f"{task}.json"
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
        before = found["asked"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file}: not a task's figures ({error}); remove it") from None
    changed = [record.change_line(key, old, new) for key, old, new in record.differences(before, asked)]
    if changed:
        raise DataError(f"{file}: was made otherwise: {'; '.join(changed)}; choose another out, or remove it")
    return found


def command(config: BenchmarksConfig, start: Sequence[str], job: Path) -> list[str]:
    """The words that start lmms-eval's process, or those of its processes."""
    many = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.processes}")
    return [sys.executable, *(many if config.processes > 1 else ()), *start, str(job)]


def _run(out: Path, config: BenchmarksConfig, say: Say, start: Sequence[str], environment: Mapping[str, str]) -> None:
    surroundings = {name: value for name, value in environment.items() if name != "LMMS_EVAL_PLUGINS"}
    # One name for every start: an interrupted task's cache is found again. Nothing is reported to anybody.
    surroundings |= {"LMMS_CACHE_RUN_ID": "run", "WANDB_MODE": "disabled", "HF_HUB_DISABLE_TELEMETRY": "1"}
    fault = None
    with open(out / LOG, "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command(config, start, out / JOB),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=surroundings,
        )
        try:
            for line in process.stdout or ():
                event = json.loads(line) if line.startswith(b'{"') else {}  # else what torchrun says
                fault = event.get("fault", fault)
                if "finished" in event:
                    say(f"finished: {event['finished']}")
            status = process.wait()
        finally:
            process.terminate()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                pipe.close()
    if fault is not None:
        raise DataError(f"lmms-eval: {fault}; see {out / LOG}")
    if status:
        raise DataError(f"lmms-eval ended with status {status}; see {out / LOG}")
