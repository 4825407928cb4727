"""What happens when something goes wrong in one of several processes: each fault put into a real run, and its end.

Nobody ends a process here but it itself (a launcher would). ``python dev/fault_loop.py`` plays each of `CHECKS` again
and again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from prism_fast.run import checkpoint
from prism_fast.run.monitor import read_metrics
from tests.cluster.fault_scenario import NOTHING, End, Fault, Started
from tests.cluster.launch import ROOT, environment
from tests.tiny_run import settings

STEPS = 4
BROKEN = 3  # the step
Check = Callable[[Path, Path], None]  # (a tiny run's inputs, a folder of its own)


def command(
    tiny: Path, out: Path, form: str = "none", *, stage: str = "sft", timeout: float = 1.0, **changes: Any
) -> list[str]:
    """Of a run of STEPS steps that saves each of them. ``changes``: of the section ``run``, or of others by name."""
    tree = settings(tiny, stage, out, steps=STEPS, cluster={"sharding": form, "timeout_minutes": timeout})
    tree["run"] |= {"save_every": 1, "keep_last": 9, "eval_every": 0, **changes.pop("run", {})}
    file = out.with_name(f"{out.name}.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**tree, **changes}))
    return [stage, "--config", str(file)]


def play(words: list[str], folder: Path, fault: Fault = NOTHING, world: int = 2) -> list[End]:
    return Started(words, folder, fault, world).ends()


def assert_ends(ends: list[End], *statuses: int | None) -> None:
    said = "".join(f"\nrank {rank}: {end.status}\n{end.errors[-3000:]}" for rank, end in enumerate(ends))
    assert [end.status for end in ends] == list(statuses), said


def weights(out: Path, step: int | None = None) -> dict[str, Any]:
    folder = out / "final" if step is None else out / "checkpoints" / f"step-{step:06d}"
    return {
        name: value for file in sorted(folder.rglob("model*.safetensors")) for name, value in load_file(file).items()
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys() and all(found[name].equal(value) for name, value in expected.items())


def uninterrupted(tiny: Path, form: str, world: int) -> dict[str, Any]:
    """The weights of a run that nothing happens to; made once."""
    out = tiny / f"uninterrupted-{form}-{world}"
    if not (out / "final").exists():
        assert_ends(play(command(tiny, out, form), tiny / f"{out.name}-said", world=world), *[0] * max(1, world))
    return weights(out)


def assert_goes_on(words: list[str], tiny: Path, folder: Path, form: str = "none", world: int = 2) -> None:
    """Started again it ends as if nothing had happened, bit for bit, and nothing half written is left."""
    assert_ends(play([*words, "--resume"], folder / "again", world=world), *[0] * max(1, world))
    assert_same(weights(folder / "run"), uninterrupted(tiny, form, world))
    assert not list((folder / "run" / "checkpoints").glob(".*"))


# ---- a process that is gone


def killed(tiny: Path, folder: Path, where: str, form: str = "none") -> None:
    words = command(tiny, folder / "run", form)
    ends = play(words, folder, Fault(where, BROKEN))
    assert_ends(ends, 1, -signal.SIGKILL)
    told = "error: rank 1 of 2 has ended, or its machine does not answer; start again with --resume\n"
    assert ends[0].errors == told, ends[0].errors
    assert BROKEN not in checkpoint.steps(folder / "run" / "checkpoints")
    said = [line["warning"] for line in read_metrics(folder / "run" / "metrics.jsonl") if "warning" in line]
    assert all(re.fullmatch("a checkpoint was not written: a process is gone, .*", text) for text in said), said
    assert_goes_on(words, tiny, folder, form)


def first_killed(tiny: Path, folder: Path) -> None:
    """The first one is where the others meet: what they left for each other is gone with it."""
    words = command(tiny, folder / "run")
    ends = play(words, folder, Fault("dies-in-step", BROKEN, rank=0))
    assert_ends(ends, -signal.SIGKILL, 1)
    assert ends[1].errors.endswith("rank 1: error: rank 0, or what started it, has ended; start again with --resume\n")
    assert_goes_on(words, tiny, folder)


def full_disk(tiny: Path, folder: Path, world: int = 2) -> None:
    """For one process, at one checkpoint."""
    words, out = command(tiny, folder / "run"), folder / "run"
    assert_ends(play(words, folder, Fault("full-disk", BROKEN, rank=max(0, world - 1)), world), *[0] * max(1, world))
    (said,) = [line["warning"] for line in read_metrics(out / "metrics.jsonl") if "warning" in line]
    kept = out / "checkpoints" / f"step-{BROKEN - 1:06d}"
    told = f"step {BROKEN}: the checkpoint could not be written (File too large); the last one is {kept}; free space "
    assert said.startswith(told), said
    assert checkpoint.steps(kept.parent) == [step for step in range(1, STEPS + 1) if step != BROKEN]
    assert not list(kept.parent.glob(".*"))
    assert_same(weights(out), uninterrupted(tiny, "none", world))


def asked_to_stop(tiny: Path, folder: Path, asked: slice = slice(None), world: int = 2) -> None:
    """All of them, or some: they end together."""
    words = command(tiny, folder / "run", run={"save_every": 0})
    started = Started(words, folder, Fault("waits", BROKEN, rank=None), world)
    for rank in started.ranks:
        started.wait_for(rank)
    for process in started.processes[asked]:
        os.kill(process.pid, signal.SIGTERM)
    ends = started.ends()
    assert_ends(ends, *[0] * max(1, world))
    saved = folder / "run" / "checkpoints" / f"step-{BROKEN:06d}"
    told = f"stopped by SIGTERM; saved {saved}; go on with --resume\n"
    assert [end.errors for end in ends] == [told, *[""] * (len(ends) - 1)]
    assert_goes_on(words, tiny, folder, world=world)


# ---- a process that does not come


def hangs(tiny: Path, folder: Path, how: str) -> None:
    """In the call that the others are in; alive, or halted as by a debugger or a machine that is gone."""
    words = command(tiny, folder / "run", timeout=0.5)
    started = Started(words, folder, Fault(how, BROKEN))
    ends = started.ends(but=[1] if how == "halts" else [])
    assert_ends(ends, 1, None if how == "halts" else 1)
    first, second = (end.errors for end in ends)
    assert re.search(r'File ".*ranks\.py", line \d+,? in add_gradients', first), first
    why = "has ended, or its machine does not answer" if how == "halts" else "did not come to what the others wait for"
    told = rf"(?m)^error: rank 1 of 2 {why}; (.*; )?start again with --resume$"
    assert len(re.findall(told, first)) == 1, first
    if how == "hangs":
        assert re.search(r"fault_scenario\.py\", line \d+ in hang", second), second
        assert "error:" not in second


# ---- numbers that are not finite


def skipped_once(tiny: Path, folder: Path, fault: str, world: int = 2, form: str = "none") -> None:
    words = command(tiny, folder / "run", form)
    ends = play(words, folder, Fault(fault, BROKEN, rank=1 if world else 0), world)
    assert_ends(ends, *[0] * max(1, world))
    lines = {line["step"]: line for line in read_metrics(folder / "run" / "metrics.jsonl") if "lr" in line}
    assert {step: line.get("skipped_updates") for step, line in lines.items()} == {1: None, 2: None, 3: 1.0, 4: None}
    before, after, last = (weights(folder / "run", step) for step in (BROKEN - 1, BROKEN, STEPS))
    assert_same(after, before)
    assert any(not last[name].equal(value) for name, value in after.items())
    assert all(value.isfinite().all() for value in last.values())


def skipped_again_and_again(tiny: Path, folder: Path, fault: str, world: int = 2) -> None:
    words = command(tiny, folder / "run", run={"max_skipped_updates": 2})
    ends = play(words, folder, Fault(f"{fault}-on", BROKEN, rank=1 if world else 0), world)
    assert_ends(ends, *[2] * max(1, world))
    assert re.fullmatch(
        r"error: .*/run: 2 updates in a row were skipped, the last as a gradient is not finite; stopped at step 4, "
        r"last saved .*/step-000004, their records are in .*/run/skipped_updates.jsonl; lower the .*\n",
        ends[0].errors,
    )
    assert not any(end.errors for end in ends[1:])
    told = [json.loads(line) for line in (folder / "run" / "skipped_updates.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [3, 4]
    for line in told:  # batch_size of them, each of which can be found
        assert len(line["records"]) == 4
        assert all(re.fullmatch(r".*/sft\.json:\d+", record) for record in line["records"])


# ---- records


def over_capacity(tiny: Path, folder: Path) -> None:
    """A prompt and a response that no pack has room for."""
    words = command(tiny, folder / "run", run={"tokens_per_pack": 20})
    ends = play(words, folder)
    assert_ends(ends, 2, 2)
    assert re.fullmatch(
        r"error: .*sft\.json:\d+: prompt of \d+ tokens .* do not fit in a pack of 20; .*\n", ends[0].errors
    )
    assert ends[1].errors == ""


def bad_record(tiny: Path, folder: Path) -> None:
    """An image that does not open, of a record that the second process looks at."""
    data = folder / "data"
    data.mkdir(parents=True)
    records = json.loads((tiny / "data" / "sft.json").read_text())[:4]
    for number, record in enumerate(records):
        image = data / f"{number}.png"
        image.write_bytes((tiny / "data" / record["images"][0]).read_bytes()[: 100 if number == 1 else None])
        record["images"] = [image.name]
    (data / "sft.json").write_text(json.dumps(records))
    words = command(tiny, folder / "run", data={"files": [str(data / "sft.json")]})
    ends = play(words, folder)
    assert_ends(ends, 2, 2)
    said = sorted(end.errors for end in ends)
    assert said[0] == "" and re.fullmatch(r"error: .*sft\.json:2: images: .*1\.png does not open .*\n", said[1])


# ---- what is left behind by others, and what others may see


def build_lock(tiny: Path, folder: Path) -> None:
    """Of a build that was killed: every start that needs that extension waits for it, silently."""
    lock = folder / "extensions" / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    started = Started(["doctor"], folder, world=0, environ={"TORCH_EXTENSIONS_DIR": str(folder / "extensions")})
    (end,) = started.ends()
    assert end.status == 0
    (line,) = [line for line in end.out.splitlines() if str(lock) in line]
    assert re.search(r"a build's lock, \d+ minutes old; if no build is running .*, remove it", line)


def listens(tiny: Path, folder: Path, world: int = 2, form: str = "none") -> None:
    """A run listens where its processes meet, on the interface that was given, and nowhere else; alone not at all."""
    words = command(tiny, folder / "run", form)
    started = Started(words, folder, Fault("waits", BROKEN, rank=None), world)
    for rank in started.ranks:
        started.wait_for(rank)
    found = [listening(process.pid) for process in started.processes]
    assert_ends(started.ends(), *[0] * max(1, world))
    if world:
        assert found[0] and {host for here in found for host, _ in here} == {"0100007F"}, found
    else:
        assert found == [[]]


def listening(pid: int) -> list[tuple[str, int]]:
    """(address as the system writes it, port) of every socket on which a process listens."""
    own = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if link.exists() or link.is_symlink():
            own.add(os.readlink(link))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    found = [row[1].split(":") for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]
    return [(host, int(port, 16)) for host, port in found]


SHARDED = ("zero1", "zero2", "zero3", "fsdp2")
CHECKS: dict[str, Check] = {
    "killed in a step": partial(killed, where="dies-in-step"),
    "killed in a collective": partial(killed, where="dies-in-collective"),
    "killed while it writes": partial(killed, where="dies-while-writing"),
    "a full disk": full_disk,
    "the first killed": first_killed,
    "SIGTERM to all": asked_to_stop,
    "SIGTERM to one of them": partial(asked_to_stop, asked=slice(1, 2)),
    "a hung collective": partial(hangs, how="hangs"),
    "a halted process": partial(hangs, how="halts"),
    "a NaN gradient": partial(skipped_once, fault="nan-gradient"),
    "an infinite loss": partial(skipped_once, fault="infinite-loss"),
    "NaN losses in a row": partial(skipped_again_and_again, fault="nan-loss"),
    "a sample over the capacity": over_capacity,
    "a bad record": bad_record,
    "a stale build lock": build_lock,
    "listening sockets": listens,
    "alone: a full disk": partial(full_disk, world=0),
    "alone: SIGTERM": partial(asked_to_stop, world=0),
    "alone: a NaN gradient": partial(skipped_once, fault="nan-gradient", world=0),
    "alone: NaN losses in a row": partial(skipped_again_and_again, fault="nan-loss", world=0),
    "alone: no listening socket": partial(listens, world=0),
    **{f"{form}: killed in a step": partial(killed, where="dies-in-step", form=form) for form in SHARDED},
    **{f"{form}: killed while it writes": partial(killed, where="dies-while-writing", form=form) for form in SHARDED},
    **{f"{form}: a NaN loss": partial(skipped_once, fault="nan-loss", form=form) for form in SHARDED},
}
CHEAP = ("killed in a collective", "NaN losses in a row", "a sample over the capacity")


@pytest.mark.parametrize("name", CHEAP)
def test_a_fault(name, tiny_folder, tmp_path):
    CHECKS[name](tiny_folder, tmp_path)


@pytest.mark.cluster
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in CHEAP])
def test_another_fault(name, tiny_folder, tmp_path):
    CHECKS[name](tiny_folder, tmp_path)


@pytest.mark.cluster
def test_a_launcher_names_the_process_that_was_killed(tiny_folder, tmp_path):
    words = command(tiny_folder, tmp_path / "run")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    scenario = ["-m", "tests.cluster.fault_scenario", "dies-in-step", str(BROKEN), "1"]
    done = subprocess.run(
        [sys.executable, *launcher, *scenario, *words],
        env=environment(0, 0, 0),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.count("error: rank 1 of 2 has ended") == 1
    assert re.search(r"rank\s+: 1 \(local_rank: 1\)[\s\S]*exitcode\s+: -9", done.stderr), done.stderr[-3000:]
