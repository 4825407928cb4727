"""Tokens/s of sampling: the built-in sampler beside transformers' ``generate`` and continuous batching, vLLM, a base.

Every way samples ``samples`` responses to each of the same prompts, at most ``rows`` at once, at temperature 1, in a
process of its own, in turn; the end of turn is favoured so that lengths come out around ``mean`` (0: all go to the
limit). Prompts are text, as that is what all ways take; their lengths are ragged. Which tokens come differs by way, so
ratios are of tokens/s. A CPU's seconds are those of the process: others may use the machine. "prefill" is the time of
the same call with a limit of one token, "decode" the rest. ``--base REV`` adds the sampler of another commit, checked
out and built for it. Log-probs of ours and of the base are held to transformers' own forward, else no speed is shown.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import measure, processes
from benchmarks.harness.compare import checkout
from benchmarks.harness.document import add_errors, add_times
from benchmarks.harness.lengths import SIGMA, factors, scaled
from benchmarks.harness.machine import ROOT, version
from benchmarks.harness.measure import Unavailable
from benchmarks.harness.run import Options
from benchmarks.steps.case import TINY, Shape, stock_model
from benchmarks.steps.launches import launches_of_a_token
from benchmarks.steps.policy import QWEN3_VL_4B

ABOUT = __doc__  # of this file: in a class the name is its own

OURS = "ours, built-in sampler"
PEERS = {  # name: (way of rollout_side.py, the package it needs)
    "transformers generate, batches of rows": ("generate", "transformers"),
    "transformers generate, a prompt at a time": ("generate apart", "transformers"),
    "transformers generate_batch": ("continuous", "transformers"),
    "vLLM": ("vllm", "vllm"),
}
BOUNDS = {"float32": 1e-4, "bfloat16": 1e-1}  # of log-probs, in nats a token
PATIENCE = {"cpu": 120.0, "cuda": 400.0}  # seconds for one answer
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Load:
    """``prompt``: mean tokens; ``mean`` 0: no response ends before the limit."""

    model: str
    prompts: int
    samples: int
    rows: int
    prompt: int
    limit: int
    mean: int = 0
    peers: bool = True  # transformers pads what is ragged, and takes minutes on a CPU

    def drawn(self, words: int) -> list[list[int]]:
        """The prompts."""
        random = torch.Generator().manual_seed(0)
        lengths = [scaled(self.prompt, f) for f in factors(self.prompts, SIGMA, random)]
        return [torch.randint(0, words, (n,), generator=random).tolist() for n in lengths]


DEMO = TINY.dense(
    hidden=160, layers=4, heads=6, kv_heads=2, head_dim=32, inner=480, vocab=512, vision_depth=2, vision_hidden=96,
    vision_inner=256, deepstack=(0,),
)  # fmt: skip
MODELS: dict[str, tuple[Shape, torch.dtype]] = {
    "tiny": (DEMO, torch.float32),
    "4b": (QWEN3_VL_4B, torch.bfloat16),
}
LOADS = {
    "64": Load("tiny", 4, 16, 64, 36, 48),
    "64-ragged": Load("tiny", 8, 8, 64, 36, 128, mean=24, peers=False),
    "256-ragged": Load("tiny", 32, 16, 256, 36, 128, mean=24, peers=False),
    "4b-64": Load("4b", 4, 16, 64, 1024, 256),
    "4b-256": Load("4b", 16, 16, 256, 1024, 256),
    "4b-256-ragged": Load("4b", 32, 16, 256, 1024, 1024, mean=400),
    "mini": Load("tiny", 2, 2, 4, 9, 6),
}
DEFAULT = {"cpu": ("64", "64-ragged", "256-ragged"), "cuda": ("4b-64", "4b-256", "4b-256-ragged")}


class Way:
    """A process of rollout_side.py. ``root``: the tree whose packages it has."""

    def __init__(self, way: str, root: Path, folder: Path, device: torch.device):
        self.patience = PATIENCE[device.type]
        script = ROOT / "benchmarks" / "steps" / "rollout_side.py"
        command = [sys.executable, "-P", str(script), way, str(folder), device.type]
        paths = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        quiet = {"stderr": subprocess.DEVNULL, "cwd": folder}
        self.process = subprocess.Popen(command, env=processes.environment() | paths, **pipes, **quiet)
        self.reader = ThreadPoolExecutor(1)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises Unavailable with the reason of one that cannot run, has ended, or is late."""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        try:
            found = self.reader.submit(self._answer).result(self.patience)
        except TooLate:
            self.process.kill()
            raise Unavailable(f"no answer within {self.patience:.0f} s") from None
        if "unavailable" in found:
            raise Unavailable(found["unavailable"])
        return found

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
        return {"unavailable": f"its process ended ({how})"}

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.reader.shutdown()


def built(revision: str, stack: ExitStack) -> Path:
    """A tree of that commit, with its extension."""
    tree = stack.enter_context(checkout(revision, ROOT))
    measure.say(f"building the extension of {revision}")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--base {revision}: its extension does not build: {done.stderr.strip().splitlines()[-1:]}")
    return tree


def saved(model: str, folder: Path, device: torch.device) -> Path:
    """A folder of the model, random."""
    shape, dtype = MODELS[model]
    made = stock_model(shape, dtype, device, seed=0)
    made.config.text_config.eos_token_id = end_of(shape)
    made.save_pretrained(folder)
    return folder


def end_of(shape: Shape) -> int:
    return shape.vocab - 6  # before the five of images and padding


class Rollout:
    """A benchmark as `harness.run` runs them."""

    op = "rollout"
    description = ABOUT
    seconds = 60.0  # of one problem; at least 3 rounds

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--shape", action="append", choices=sorted(LOADS), help="repeatable; default: by device")
        parser.add_argument("--base", metavar="REV", dest="before", help="the sampler of this commit beside ours")
        parser.add_argument("--peers", help="parts of names, comma-separated; '' for none (default: all)")

    def options(self, given: argparse.Namespace) -> dict[str, Any]:
        names = given.shape or (("mini",) if given.dry_run else DEFAULT[given.device])
        peers = None if given.peers is None else [part for part in given.peers.split(",") if part]
        return {"shapes": tuple((name, given.before) for name in names), "peers": peers}

    def dtypes(self, options: Options) -> dict[str, torch.dtype]:
        return {}

    def results(self, options: Options, keep: Keep) -> Iterator[dict[str, Any]]:
        with ExitStack() as stack:
            trees: dict[str, Path] = {}
            folders: dict[str, Path] = {}
            for name, before in options.shapes:
                load = LOADS[name]
                if before and before not in trees:
                    trees[before] = built(before, stack)
                if load.model not in folders:
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    folders[load.model] = saved(load.model, folder, options.device)
                    measure.free(options.device)
                yield result(name, load, folders[load.model], trees, options, keep)


def result(name: str, load: Load, folder: Path, trees: dict[str, Path], options: Options, keep: Keep) -> dict[str, Any]:
    shape, dtype = MODELS[load.model][0], str(MODELS[load.model][1]).removeprefix("torch.")
    found: dict[str, Any] = {
        "name": "rollout", "title": f"sampling, {name}", "status": "ok", "flops": 0.0, "bytes": 0.0,
        "shape": {"load": name, **vars(load), "dtype": dtype},
        "sizes": ["model", "prompts", "samples", "rows", "prompt", "limit", "mean", "dtype"],
        "launches": launches_of_a_token(), "rows": [],
    }  # fmt: skip
    ways = {OURS: ("builtin", ROOT)} | {f"base {commit}": ("builtin", tree) for commit, tree in trees.items()}
    parts = options.peers if options.peers is not None else ("",) if load.peers else ()
    wanted = [n for n in PEERS if any(part in n for part in parts)]
    for peer in wanted:
        if version(PEERS[peer][1]) is not None:
            ways[peer] = PEERS[peer][0], ROOT
    favour = math.log(shape.vocab / load.mean) if load.mean else -100.0
    request = {"prompts": load.drawn(end_of(shape)), "favour": favour}
    request |= {key: getattr(load, key) for key in ("samples", "limit", "rows")}
    found["rows"] = rows = [{"name": n, "role": "ours" if n == OURS else "peer", "status": "ok"} for n in ways]
    rows += [
        {"name": peer, "role": "peer", "status": "not installed", "reason": f"not installed ({PEERS[peer][1]})"}
        for peer in wanted
        if peer not in ways
    ]
    # On a GPU one after another, as each takes what memory there is.
    names = list(ways)
    for together in [names] if options.device.type == "cpu" else [[n] for n in names]:
        with ExitStack() as stack:
            sides = {}
            for n in together:
                sides[n] = Way(*ways[n], folder, options.device)
                stack.callback(sides[n].close)
            in_turn(sides, {row["name"]: row for row in rows}, request, options, BOUNDS[dtype], lambda: keep(found))
    compare(rows, load)
    wrong = [row for row in rows if row["status"] == "wrong"]
    if wrong:
        for row in rows:
            row.pop("median_s", None)
        found.update(status="refused", reason="; ".join(f"{row['name']}: {row['reason']}" for row in wrong))
    return found


def in_turn(
    sides: dict[str, Way], rows: dict[str, dict[str, Any]], request: dict[str, Any], options: Options,
    bound: float, keep: Callable[[], None],
) -> None:  # fmt: skip
    """Rounds of all ways: a row gets "rounds": [{"seconds", "prefill_s", "tokens"}]. Who cannot run leaves; whose
    log-probs are beyond ``bound`` is wrong."""
    alive = dict(sides)

    def attempt(name: str, **changes: Any) -> dict[str, Any] | None:
        try:
            return alive[name].ask(**request | changes)
        except Unavailable as error:
            rows[name].update(status="failed", reason=str(error))
            rows[name].pop("rounds", None)
            del alive[name]
            return None

    took = 0.0
    for name in list(alive):
        measure.say(f"{name}: warm-up and check")
        first = attempt(name, seed=10_000, check=True)
        took += first["seconds"] if first else 0.0
        if first and "error" in first:
            bounds = {"log-prob": bound}
            bad = add_errors(rows[name], {"log-prob": first["error"]}, {"log-prob": "mean"}, bounds)
            if bad:
                rows[name].update(status="wrong", reason=bad)
    rounds = options.rounds or max(3, min(20, int(options.seconds / max(took, 1e-3))))
    for index in range(rounds):
        for name in list(alive) if index % 2 == 0 else list(reversed(alive)):
            prefill = attempt(name, seed=index, limit=1)
            whole = attempt(name, seed=index) if prefill else None
            if prefill and whole:
                one = {"seconds": whole["seconds"], "prefill_s": prefill["seconds"], "tokens": whole["tokens"]}
                rows[name].setdefault("rounds", []).append(one)
        keep()


def compare(rows: list[dict[str, Any]], load: Load) -> None:
    """Times, speeds and ratios within a round out of the rounds."""
    ours = rows[0].get("rounds", [])
    for row in rows:
        taken = row.get("rounds")
        if not taken or row["status"] != "ok":
            continue
        add_times(row, [one["seconds"] for one in taken])
        speeds = [one["tokens"] / one["seconds"] for one in taken]
        row["tokens_per_s"] = statistics.median(speeds)
        row["prefill_s"] = statistics.median(one["prefill_s"] for one in taken)
        responses = load.prompts * load.samples
        decode = [(one["tokens"] - responses, max(one["seconds"] - one["prefill_s"], 1e-9)) for one in taken]
        row["decode_tokens_per_s"] = statistics.median(tokens / seconds for tokens, seconds in decode)
        if not load.mean and load.rows >= responses:
            row["token_s"] = statistics.median(seconds for _, seconds in decode) / (load.limit - 1)
        if row is not rows[0] and ours:
            mine = [one["tokens"] / one["seconds"] for one in ours]
            ratios = sorted(a / b for a, b in zip(mine, speeds))
            row.update(times_ours=statistics.median(ratios), times_ours_low=ratios[0], times_ours_high=ratios[-1])


BENCH = Rollout()
