"""The command that starts a stage on several GPUs, as text: for torchrun, or as a batch file for SLURM. Starts nothing.

::

    >>> print(command(Launch("align", ("--config", "cluster_8x80", "run.out=runs/align"), gpus=8)))
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280 torchrun --standalone --nproc-per-node 8 \\
      -m prism_fast align --config cluster_8x80 run.out=runs/align
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from prism_fast.config import AlignConfig, RLVRConfig, SFTConfig, WarmupConfig
from prism_fast.records import DataError
from prism_fast.run.lock import FILE_NAME as LOCK

STAGES = ("sft", "warmup", "align", "rlvr")
PORT = 29500
NOTICE = 300  # seconds before the limit at which SLURM asks a run to stop
# torchrun passes a signal on and kills what still runs so many seconds later, 30 of its own: a step and its checkpoint
# take longer. Its own option came late; releases that do not know the variable ignore it.
PATIENCE = f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={NOTICE - 20}"
# What ACCELERATE_DEEPSPEED_ZERO_STAGE is where accelerate means the same.
ZERO_STAGES = {"none": "0", "zero1": "1", "zero2": "2", "zero3": "3"}

StageConfig = SFTConfig | WarmupConfig | AlignConfig | RLVRConfig


class Launch(NamedTuple):
    """A stage, what follows it on the command line, and where it runs.

    ``Launch("sft", ("--config", "sft_4b", "run.out=runs/sft"), nodes=2, gpus=8, endpoint="node1:29500")``
    """

    stage: str
    words: tuple[str, ...]
    nodes: int = 1
    gpus: int = 1  # of one node
    endpoint: str = ""  # HOST or HOST:PORT of the first node
    out: Path = Path("out")  # run.out
    time: str = ""  # HH:MM:SS, of SLURM
    partition: str = ""  # of SLURM
    cpus: int = 8  # cores for each GPU, of SLURM


def command(launch: Launch) -> str:
    """What a shell runs: on the one node, or the same on each of several. One process needs no launcher."""
    if launch.nodes == launch.gpus == 1:
        return f"prism-fast {shlex.join((launch.stage, *launch.words))}"
    if launch.nodes == 1:
        return _lines(f"{PATIENCE} torchrun --standalone --nproc-per-node {launch.gpus}", _stage(launch))
    if not re.fullmatch(r"[\w.-]+(:\d+)?", launch.endpoint):
        got = f"got {launch.endpoint!r}" if launch.endpoint else "it is missing"
        raise DataError(
            f"launch: --endpoint: expected HOST or HOST:PORT, the first of {launch.nodes} nodes, where they meet, {got}"
        )
    host, _, port = launch.endpoint.partition(":")
    meet = _rendezvous(launch, f"{host}:{port or PORT}", shlex.quote(f"prism-{launch.stage}"))
    same = f"# the same command on each of the {launch.nodes} nodes, within some minutes of each other"
    return f"{same}\n{_lines(f'{PATIENCE} torchrun', meet, _stage(launch))}"


def batch_file(launch: Launch) -> str:
    """A file for sbatch: one task per node, each of them a torchrun that starts a process per GPU.

    SLURM sends SIGTERM to torchrun ``NOTICE`` seconds before the limit, torchrun to the processes, which save and end.
    """
    seconds = _seconds(launch.time)
    if re.search(r"\s", launch.partition):
        raise DataError(f"launch: --partition: expected a name without spaces, got {launch.partition!r}")
    options = [f"--job-name=prism-{launch.stage}", f"--nodes={launch.nodes}", "--ntasks-per-node=1"]
    options += [f"--gpus-per-node={launch.gpus}", f"--cpus-per-task={launch.gpus * launch.cpus}"]
    options += [f"--partition={launch.partition}"] if launch.partition else []
    options += [f"--time={launch.time}"] if launch.time else []
    options += [f"--signal=TERM@{NOTICE}", "--requeue", "--open-mode=append", "--output=%x-%j.log"]
    out = shlex.quote(str(launch.out))
    meet = _rendezvous(launch, '"$host:$port"', '"$SLURM_JOB_ID"')
    run = _lines('srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun', meet, _stage(launch))
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options)]
    lines += ["# The folder of this file's submission, run.out and data must lie where every node sees them."]
    lines += [f"export {PATIENCE}"]
    lines += ['host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)']
    lines += [f"port=$(({PORT} + SLURM_JOB_ID % 1000))  # two jobs may share a node"]
    if "--resume" not in launch.words:
        lines += [f"resume=; if [ -e {out}/{LOCK} ]; then resume=--resume; fi  # started before: goes on"]
        run += " $resume"
    lines += [run, "status=$?"]
    if seconds:
        lines += ["# Not done when its time was over: into the queue again. (--requeue is for nodes that fail.)"]
        lines += [f'if [ ! -e {out}/final ] && [ "$SECONDS" -ge {seconds - NOTICE - 60} ]; then']
        lines += ['  scontrol requeue "$SLURM_JOB_ID"', "fi"]
    return "\n".join([*lines, "exit $status"])


def warnings(launch: Launch, config: StageConfig) -> list[str]:
    """What runs, but not as well as it could: a line for each."""
    ranks, sharding, found = launch.nodes * launch.gpus, config.cluster.sharding, []
    if isinstance(config, (SFTConfig, WarmupConfig)):
        count, what = config.batch_size, f"batch_size = {config.batch_size}"
    else:
        rollout = config.rollout
        count = rollout.prompts_per_step * rollout.samples
        what = f"rollout.prompts_per_step x rollout.samples = {count}"
    if count % ranks:
        found.append(f"{what} is no multiple of {ranks} processes; some wait for others in every step")
    sections = [getattr(config, n) for n in type(config).model_fields if n.endswith("optimizer")]
    offload = any(section.offload for section in sections)
    if sharding != "none" and ranks == 1 and not offload:
        found.append(f"cluster.sharding = {sharding} shards nothing among 1 process")
    if launch.nodes > 1 and sharding in ("zero3", "fsdp2"):
        found.append(f"cluster.sharding = {sharding} gathers every weight over the network; zero2 moves a third of it")
    return found


def check_stage(stage: str) -> None:
    """Raises DataError where no command of that name runs on several GPUs."""
    if stage not in STAGES:
        raise DataError(f"launch: {stage!r} does not run on several GPUs; expected one of {', '.join(STAGES)}")


def check_environment(sharding: str, environ: Mapping[str, str]) -> None:
    """Raises DataError where accelerate was told another sharding than ``cluster.sharding``, which decides."""
    theirs = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if theirs is None or theirs == ZERO_STAGES.get(sharding):
        return
    ours = next((form for form, stage in ZERO_STAGES.items() if stage == theirs), None)
    fix = f"set cluster.sharding={ours}" if ours else "correct it"
    raise DataError(
        f"ACCELERATE_DEEPSPEED_ZERO_STAGE={theirs}: accelerate was set up for another sharding than cluster.sharding = "
        f"{sharding}, which decides here; {fix}, or take DeepSpeed out of accelerate's configuration"
    )


def _rendezvous(launch: Launch, endpoint: str, name: str) -> str:
    size = f"--nnodes {launch.nodes} --nproc-per-node {launch.gpus}"
    return f"{size} --rdzv-backend c10d --rdzv-endpoint {endpoint} --rdzv-id {name}"


def _stage(launch: Launch) -> str:
    return f"-m prism_fast {shlex.join((launch.stage, *launch.words))}"


def _lines(*parts: str) -> str:
    return " \\\n  ".join(parts)


def _seconds(time: str) -> int:
    """HH:MM:SS as seconds, 0 where it is not given. Raises DataError."""
    if not time:
        return 0
    found = re.fullmatch(r"(\d{1,4}):([0-5]\d):([0-5]\d)", time)
    seconds = sum(int(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    if seconds <= 2 * NOTICE:
        raise DataError(
            f"launch: --time: expected HH:MM:SS of more than {2 * NOTICE // 60} minutes, of which the last "
            f"{NOTICE // 60} are for saving; got {time!r}"
        )
    return seconds
