"""Training a 4B policy on one device at the lengths of recipe cluster_1x80: bytes and seconds, beside the plan.

Random weights with the published dimensions of Qwen3-VL-4B, in bf16, made on the device; nothing is downloaded. A step
is two packs, both full to the last token, and the update. Responses are ragged; at "-even" all are as long as they may
be. The trainer's own code: `policy_gradient` through an updater of `open_updater`. Each form of sharding is a process
of its own, so that one that runs out of memory is a result. What it had measured by then is kept; so is what stands
when the time is up. Weights and data of all forms are the same, so the norms of their first gradients must be nearly
so.

"planned" is the count of `prism-fast plan`, with 3 GB of CUDA's context and fragments in it. "allocated" and "reserved"
are the peaks of torch's allocator. "host": the largest resident memory of the process; "host, taken": how much less the
machine had left at the worst, which also holds pinned memory.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import measure, processes
from benchmarks.harness.document import save
from benchmarks.harness.lengths import SIGMA, factors, scaled
from benchmarks.harness.machine import ROOT, version
from benchmarks.harness.run import Options
from benchmarks.steps import flops
from benchmarks.steps.case import MERGE, PATCH, TEMPORAL, Shape, stock_model
from benchmarks.steps.host import Host
from prism_fast import ranks
from prism_fast.config import ClusterConfig, OptimizerConfig
from prism_fast.models.policy import Policy
from prism_fast.records import Prompt, Rollout
from prism_fast.run import memory
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.update import Updater, open_updater
from prism_kernels import PolicyObjective

ABOUT = __doc__  # of this file: in a class the name is its own

CHILD = [sys.executable, "-m", "benchmarks.steps.training"]
WARMUPS, MEASURED = 1, 2
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Form:
    """A way to hold weights, gradients and the optimizer's state."""

    name: str
    sharding: str
    offload: bool = False


# The one that 80 GB are planned for comes first: what comes later may lack the time.
FORMS = (Form("zero2 with offload", "zero2", offload=True), Form("fsdp2", "fsdp2"), Form("none", "none"))


@dataclass(frozen=True)
class Lengths:
    """Of a step's data, in tokens; ``grid``: patches of each prompt's image.

    ``sigma``: responses are log-normal around ``mean``; 0: all but a prompt's last one have ``response`` tokens.
    """

    tokens_per_pack: int
    prompt: int
    response: int  # of the longest
    mean: int
    grid: tuple[int, int]
    packs: int = 2  # gradients of the second are added to those of the first
    sigma: float = SIGMA

    def responses(self, number: int) -> list[int]:
        """Of prompt ``number``: its pack is full."""
        left, random = self.tokens_per_pack - self.prompt, torch.Generator().manual_seed(number)
        found: list[int] = []
        while left:
            drawn = scaled(self.mean, *factors(1, self.sigma, random)) if self.sigma else self.response
            found.append(min(drawn, self.response, left))
            left -= found[-1]
        return found


MODELS = {
    "4b": memory.POLICIES["4b"],
    "tiny": memory.Model(
        memory.Text(64, 2, 96, 2, 1, tied=True, vocab=256, head_dim=32), memory.Vision(32, 2, 64, 64, taps=1)
    ),
}
LENGTHS = {"4b": Lengths(24_576, 2_048, 6_144, 2_048, (64, 64)), "tiny": Lengths(96, 26, 30, 15, (8, 8))}
LENGTHS |= {f"{size}-even": replace(lengths, sigma=0.0) for size, lengths in LENGTHS.items()}


def model_of(size: str) -> memory.Model:
    return MODELS[size.removesuffix("-even")]


def shape_of(model: memory.Model) -> Shape:
    """The same dimensions as the random models of this folder take them; lengths are not looked at."""
    text, vision = model.text, model.vision
    taps = tuple((i + 1) * vision.depth // (vision.taps + 1) - 1 for i in range(vision.taps))
    return Shape(
        hidden=text.hidden, layers=text.layers, heads=text.heads, kv_heads=text.kv_heads, head_dim=text.head_dim,
        experts=0, top_k=1, inner=text.intermediate, vocab=text.vocab, vision_depth=vision.depth,
        vision_hidden=vision.hidden, vision_inner=vision.intermediate, vision_heads=max(1, vision.hidden // 64),
        deepstack=taps, grid=(0, 0), prompt=0, caption=0, reasoning=0, responses=0,
    )  # fmt: skip


def operations(model: memory.Model, lengths: Lengths) -> float:
    """Of one step's gradient, by formula, with activation checkpointing."""
    shape = replace(shape_of(model), grid=lengths.grid, prompt=lengths.prompt)
    work = flops.Work()
    for branches in map(lengths.responses, range(lengths.packs)):
        work += flops.vision(shape) + flops.tree(shape, branches) + flops.head(shape, sum(branches), shape.vocab)
    return work.trained(checkpointing=True)


def made_up(shape: Shape, lengths: Lengths) -> tuple[Rollout, torch.Tensor]:
    """(rollout, advantages): a prompt with an image and its responses for every pack, drawn by a fixed seed."""
    words, random = shape.vocab - 5, torch.Generator().manual_seed(0)

    def text(length: int) -> torch.Tensor:
        return torch.randint(0, words, (length,), generator=random)

    patches = lengths.grid[0] * lengths.grid[1]
    prompts, responses = [], []
    for number in range(lengths.packs):
        image = torch.full((patches // MERGE**2,), words)
        rest = lengths.prompt - len(image) - 2
        parts = [text(rest // 2), torch.tensor([words + 1]), image, torch.tensor([words + 2]), text(rest - rest // 2)]
        pixels = torch.randn(patches, 3 * TEMPORAL * PATCH**2, generator=random)
        prompts.append(Prompt(torch.cat(parts), pixels, torch.tensor([[1, *lengths.grid]]), bytes([number])))
        responses.append([text(length) for length in lengths.responses(number)])
    flat = [ids for group in responses for ids in group]
    rollout = Rollout(
        prompts=prompts,
        group=torch.arange(len(prompts)).repeat_interleave(torch.tensor([len(group) for group in responses])),
        response_ids=flat,
        logprob=[torch.zeros(len(ids)) for ids in flat],
        text=[""] * len(flat),
        finished=torch.ones(len(flat), dtype=torch.bool),
    )
    return rollout, torch.tensor([1.0, -1.0]).repeat(len(flat))[: len(flat)]


def train(form: Form, size: str, device: torch.device, keep: Keep) -> None:
    """Runs the steps; ``keep(row)`` has what is known after each of its parts."""
    host = Host()
    row: dict[str, Any] = {"status": "cut off", "seconds": {}, "steps": []}

    def known() -> None:
        row.update(host.bytes())
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            row["reserved_bytes"] = torch.cuda.max_memory_reserved()
            free, total = torch.cuda.mem_get_info()
            row["device_taken_bytes"] = total - free
        keep(row)

    def timed(name: str, call: Callable[[], Any], into: dict[str, float]) -> Any:
        measure.say(f"{form.name}: {name}")
        began = time.monotonic()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        into[name] = time.monotonic() - began
        known()
        return result

    try:
        with ranks.joined(alone=form.sharding != "none"), host.watched():
            _steps(form, size, device, row, timed)
    except torch.OutOfMemoryError as error:
        row.update(status="out of memory", reason=measure.short(error))
    except Exception as error:
        row.update(status="failed", reason=measure.short(error))
        known()
        raise
    else:
        row["status"] = "ok"
    known()


def _steps(
    form: Form, size: str, device: torch.device, row: dict[str, Any], timed: Callable[[str, Callable, dict], Any]
) -> None:
    model, lengths, once = model_of(size), LENGTHS[size], row["seconds"]
    shape = shape_of(model)

    def build() -> Policy:
        made = Policy(stock_model(shape, torch.bfloat16, device, seed=0))
        made.checkpoint_activations()
        return made.train()

    def opened(policy: Policy) -> Updater:
        optimizer = OptimizerConfig(lr=1e-6, schedule="constant", offload=form.offload)
        return open_updater(policy, optimizer, WARMUPS + MEASURED, ClusterConfig(sharding=form.sharding))

    def gradient() -> int:
        objective = PolicyObjective.grpo()
        given = {"temperature": 1.0, "tokens_per_pack": lengths.tokens_per_pack}
        return policy_gradient(updater, rollout, advantages, objective, **given)[1]

    policy = timed("build", build, once)
    row["parameters"] = sum(p.numel() for p in policy.parameters())
    updater = timed("open", lambda: opened(policy), once)
    rollout, advantages = made_up(shape, lengths)
    for number in range(WARMUPS + MEASURED):
        parts: dict[str, float] = {}
        tokens = timed(f"gradient of step {number}", gradient, parts)
        norm = timed(f"update of step {number}", updater.step, parts)
        gradient_s, update_s = parts.values()
        row["steps"].append(
            {"gradient_s": gradient_s, "update_s": update_s, "tokens": tokens, "norm": norm if norm < 1e30 else None}
        )


def planned(model: memory.Model, form: Form, lengths: Lengths) -> memory.Need:
    """Of its first pack, on one GPU."""
    image = lengths.grid[0] * lengths.grid[1] // MERGE**2
    pack = memory.Pack.of([memory.Tree(lengths.prompt, lengths.responses(0), image)])
    return memory.need((model,), memory.Setup(form.sharding, offload=form.offload), pack)


def finished(row: dict[str, Any], plan: memory.Need, work: float) -> dict[str, Any]:
    """A row of a table: medians over the measured steps, peaks over the plan. ``work``: operations of a gradient."""
    steps = row["steps"][WARMUPS:]
    if row["status"] == "ok":
        parts = {key: statistics.median(step[key] for step in steps) for key in ("gradient_s", "update_s")}
        whole = [step["gradient_s"] + step["update_s"] for step in steps]
        row.update(parts, median_s=statistics.median(whole), low_s=min(whole), high_s=max(whole), samples=len(whole))
        row["tokens_per_s"] = steps[0]["tokens"] / row["median_s"]
        row["first_norm"] = row["steps"][0]["norm"]
        row["tflops"] = work / row["gradient_s"] / 1e12
        if any(step["norm"] is None for step in steps):
            row["reason"] = "a gradient was not finite: no update"
    if "reserved_bytes" in row:
        row["over_plan"] = row["reserved_bytes"] / plan.training
    if plan.host and "host_taken_bytes" in row:
        row["host_over_plan"] = row["host_taken_bytes"] / plan.host
    return row


class Training:
    """A benchmark as `harness.run` runs them; its one problem grows form by form."""

    op = "train-4b"
    description = ABOUT
    seconds = 240.0  # of one form: its process is ended then

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        names = [form.name for form in FORMS]
        parser.add_argument("--form", action="append", choices=names, help="repeatable; default: all")
        names = {"choices": sorted(LENGTHS), "action": "append"}
        parser.add_argument("--shape", **names, help="repeatable; default: 4b and 4b-even, tiny on a CPU")

    def options(self, given: argparse.Namespace) -> dict[str, Any]:
        tiny = given.dry_run or given.device == "cpu"
        default = ("tiny",) if tiny else ("4b", "4b-even")
        return {"shapes": tuple(given.shape or default), "only": tuple(given.form or ())}

    def dtypes(self, options: Options) -> dict[str, torch.dtype]:
        """None: nothing is related to the machine's limits, and the device is left to the forms' processes."""
        return {}

    def results(self, options: Options, keep: Keep) -> Iterator[dict[str, Any]]:
        for size in options.shapes:
            yield self.result(size, options, keep)

    def result(self, size: str, options: Options, keep: Keep) -> dict[str, Any]:
        """The problem of one size, form by form."""
        model, lengths = model_of(size), LENGTHS[size]
        shape = {"model": size.removesuffix("-even"), "dtype": "bfloat16", "parameters": model.parameters}
        shape |= asdict(lengths)
        work = operations(model, lengths)
        result: dict[str, Any] = {
            "name": "training", "title": "training a policy on one device", "shape": shape,
            "sizes": ["model", "dtype", "parameters", "tokens_per_pack", "prompt", "response", "packs", "sigma"],
            "status": "ok", "flops": work, "bytes": 0.0, "rows": [],
        }  # fmt: skip
        for form in FORMS:
            if options.only and form.name not in options.only:
                continue
            plan = planned(model, form, lengths)
            counts = {"peak_bytes": plan.training, "host_taken_bytes": plan.host, "parameters": model.parameters}
            row = {"name": f"{form.name}, planned", "role": "plan", "status": "ok", **counts}
            result["rows"].append(row)
            row = {"name": form.name, "role": "ours"}
            result["rows"].append(row)
            for found in run_form(form, size, options):
                row.update(finished(found, plan, work))
                keep(result)
        return result


def run_form(form: Form, size: str, options: Options) -> Iterator[dict[str, Any]]:
    """What the form's process has measured: once, however it ended."""
    if form.sharding.startswith("zero") and version("deepspeed") is None:
        yield {"status": "not installed", "reason": "not installed (deepspeed)", "steps": []}
        return
    path = Path(tempfile.mkdtemp(prefix="prism-training-")) / "row.json"
    request = {"form": form.name, "size": size, "device": options.device.type, "out": str(path)}
    command = [*CHILD, json.dumps(request)]
    # Only a launcher says these, and there is none: the process is alone.
    own = processes.environment(RANK=None, WORLD_SIZE=None, LOCAL_RANK=None, SLURM_PROCID=None)
    ended, interrupted = "", False
    try:
        code = subprocess.run(command, cwd=ROOT, env=own, timeout=options.seconds, stdout=sys.stderr).returncode
        if code:
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            ended += "; SIGKILL is how a machine ends what takes all its memory" if code == -signal.SIGKILL else ""
    except subprocess.TimeoutExpired:
        ended = f"took over {options.seconds:.0f} s"
    except KeyboardInterrupt:
        ended, interrupted = "interrupted", True
    row = json.loads(path.read_text()) if path.exists() else {"status": "failed", "steps": []}
    if ended and "reason" not in row:
        row.update(status="cut off" if path.exists() else "failed", reason=ended)
    yield row
    if interrupted:
        raise KeyboardInterrupt


def main(request: dict[str, str]) -> None:
    form = next(form for form in FORMS if form.name == request["form"])
    train(form, request["size"], torch.device(request["device"]), lambda row: save(row, Path(request["out"])))


BENCH = Training()

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
