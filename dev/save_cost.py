"""What saving costs the main thread, in every form: a run of 20 steps that saves at every tenth.

    python -m dev.save_cost [STAGE ...] [--forms none fsdp2] [--wait]

On the demo's data and models, with random weights (sft: 2 million parameters; align: also the discriminator's 4.7). Of
each process: seconds of the steps, and those of them that went to checkpoints, by the clock and of its CPU: copies to
the host, and waits for a checkpoint that is still being written. Apart from them: the wait for the last one, when the
run is over. On a machine that others use read the CPU seconds, and the clock as the most that it can be. ``--wait``:
with run.save_in_background=false, so that the steps wait for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dev.cluster_cost import prepare
from prism_fast.config import CONFIGS, RECIPES, load_config, merge, read_yaml
from prism_fast.run.session import Session
from prism_fast.stages.align import align
from prism_fast.stages.sft import sft
from tests.cluster.launch import launch

STAGES = {"sft": sft, "align": align}
STEPS, EVERY = 20, 10
# (form, processes); 0: one by itself
FORMS = (("none", 0), ("none", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2))


class Meter:
    """Seconds of the main thread in some of a session's methods, the outermost call's alone, by clock and CPU."""

    def __init__(self):
        self.found = {"steps": [0.0, 0.0], "saving": [0.0, 0.0], "last": [0.0, 0.0]}
        self.begun, self.inside, self.over = (0.0, 0.0), False, False

    def around(self, name: str) -> None:
        real: Callable[..., Any] = getattr(Session, name)

        def timed(*given: Any) -> Any:
            if self.inside:
                return real(*given)
            self.inside, before = True, now()
            try:
                return real(*given)
            finally:
                self.inside = False
                self._add("last" if self.over else "saving", before)

        setattr(Session, name, timed)

    def watch(self) -> None:
        for name in ("_save", "_settle"):
            self.around(name)
        begin, finish = Session.begin, Session.finish

        def begun(*given: Any, **named: Any) -> int:
            first = begin(*given, **named)
            self.begun = now()
            return first

        def finished(*given: Any) -> Any:
            self._add("steps", self.begun)
            self.over = True
            return finish(*given)

        Session.begin, Session.finish = begun, finished  # type: ignore[method-assign]

    def _add(self, name: str, before: tuple[float, float]) -> None:
        for i, (then, after) in enumerate(zip(before, now())):
            self.found[name][i] += after - then


def now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def child(stage: str, file: Path) -> None:
    """One process of a run."""
    meter = Meter()
    meter.watch()
    STAGES[stage](load_config(CONFIGS[stage], None, base=json.loads(file.read_text())))
    rank = os.environ.get("RANK", "0")
    file.with_suffix(f".{rank}.json").write_text(json.dumps(meter.found))


def measure(stage: str, form: str, world: int, data: Path, background: bool) -> str:
    recipe = read_yaml(RECIPES / "demo.yaml")
    with tempfile.TemporaryDirectory() as folder:
        own = {"out": f"{folder}/out", "save_every": EVERY, "eval_every": 0, "save_in_background": background}
        own |= {"threads": 1, "tokens_per_pack": 1024}
        files = {"sft": "sft.json", "align": "align.parquet"}[stage]
        tree = merge(recipe[stage], {"run": own, "steps": STEPS, "cluster": {"sharding": form}})
        tree["data"] = {"files": [str(data / "data" / files)], "workers": 0}
        tree["policy" if stage == "align" else "model"] = {"path": str(data / "base")}
        if stage == "align":
            tree["discriminator"] = {"path": str(data / "discriminator")}
            tree["rollout"] = {"prompts_per_step": 4, "samples": 4, "max_response_tokens": 48}
        else:
            tree["batch_size"] = 16
        file = Path(folder) / "run.json"
        file.write_text(json.dumps(tree))
        ends = launch(["-m", "dev.save_cost", "--child", stage, str(file)], world)
        for end in ends:
            if end.returncode:
                raise RuntimeError(end.stderr[-3000:])
        found = [json.loads(file.with_suffix(f".{rank}.json").read_text()) for rank in range(max(1, world))]
        saved = Path(f"{folder}/out/checkpoints/step-{STEPS:06d}")
        written = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    worst = max(found, key=lambda each: each["saving"][0] / each["steps"][0])
    (steps, cpu), (saving, own_cpu), (last, _) = (worst[name] for name in ("steps", "saving", "last"))
    return (
        f"| {stage} | {form}, {world or 1} | {written / 1e6:.0f} | {steps:.2f} | {saving:.3f} ({saving / steps:.1%}) | "
        f"{cpu:.2f} | {own_cpu:.3f} ({own_cpu / cpu:.1%}) | {last:.2f} |"
    )


def main(words: list[str]) -> None:
    if words[:1] == ["--child"]:
        child(words[1], Path(words[2]))
        return
    parser = argparse.ArgumentParser(prog="python -m dev.save_cost")
    parser.add_argument("stages", nargs="*", default=[], metavar="STAGE")
    parser.add_argument("--forms", nargs="*", default=[form for form, _ in FORMS])
    parser.add_argument("--wait", action="store_true")
    given = parser.parse_args(words)
    print("| stage | form, processes | MB | steps, s | saving, s | CPU of steps, s | CPU of saving, s | last wait, s |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder))
        for stage in given.stages or list(STAGES):
            for form, world in FORMS:
                if form in given.forms:
                    print(measure(stage, form, world, data, not given.wait), flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
