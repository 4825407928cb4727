"""One of the processes that dev/cluster_cost.py starts: alignment steps on fixed responses, by itself and among others.

    python -m dev.cluster_step FOLDER        reads FOLDER/cases.json, each process writes FOLDER/<rank>.json

Two things are found. CPU seconds: a step of the whole batch in this process alone, then the same step among all, in
turns, so that both have the same company on the machine. And what the processes tell each other in a step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prism_fast import ranks
from prism_fast.balance import SPARE, Work, deal, pack_cost
from prism_fast.config import AdvantageConfig, ClusterConfig, DataConfig, DiscriminatorStep, OptimizerConfig
from prism_fast.data.chat import Chat
from prism_fast.data.encode import lesson
from prism_fast.data.formats import read_align, read_sft
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.pack import Packs
from prism_fast.records import Lesson, Rollout
from prism_fast.steps.advantage import alignment_advantage
from prism_fast.steps.discriminator_step import discriminator_gradient, discriminator_trees, student_parts
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.own_packs import packs_for_all
from prism_fast.steps.policy_step import policy_gradient, response_trees
from prism_fast.steps.update import Updater, open_updater
from prism_kernels import PolicyObjective

MODELS = ("discriminator", "policy")
CONFIG = DiscriminatorStep()


@dataclass(frozen=True)
class Case:
    """What is computed; ``data``: a folder with data/, base/ and discriminator/ (tests/tiny_run.py)."""

    data: str
    form: str
    prompts: int = 8
    samples: int = 8
    tokens_per_pack: int = 160
    pairs: int = 0  # of steps, alone and among all, that are timed; 0: traffic is counted
    dtype: str = "float32"
    checkpoint: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of cluster.deepspeed


@dataclass
class Batch:
    """Fixed responses: demonstrations of other prompts, which the demo's teacher might have written."""

    chat: Chat
    lessons: list[Lesson]
    rollout: Rollout
    tokens_per_pack: int

    @classmethod
    def read(cls, case: Case) -> Batch:
        folder = Path(case.data)
        chat, data = Chat.load(folder / "base"), folder / "data"
        limit = DataConfig(files=(data / "align.parquet",)).max_prompt_tokens
        records = list(read_align(data / "align.parquet"))[: case.prompts]
        lessons = [lesson(record, chat, max_prompt_tokens=limit, config=CONFIG) for record in records]
        said = [sample.response for sample in read_sft(data / "sft.json")]
        total = case.prompts * case.samples
        texts = [said[i % len(said)] for i in range(total)]
        ids = [torch.cat([chat.encode_part(text), torch.tensor([chat.end_of_turn_id])]) for text in texts]
        rollout = Rollout(
            prompts=[item.prompt for item in lessons],
            group=torch.arange(case.prompts).repeat_interleave(case.samples),
            response_ids=ids,
            logprob=[torch.full((len(x),), -6.0) for x in ids],
            text=texts,
            finished=torch.ones(total, dtype=torch.bool),
        )
        return cls(chat, lessons, rollout, case.tokens_per_pack)

    def packs(self, name: str, model: Any) -> Packs:
        """Those of a model of this name, as its step makes them for so many processes."""
        trees = response_trees(self.rollout)
        if name == "discriminator":
            parts = student_parts(self.rollout, self.chat, CONFIG)
            trees, _ = discriminator_trees(self.lessons, self.rollout, parts)
        return packs_for_all(trees, self.tokens_per_pack, model)


@dataclass
class Traffic(TorchDispatchMode):
    """Records every collective of this process, as torch dispatches it: [phase, op, dtype, numbers]."""

    phase: str = ""
    seen: list[tuple[str, str, str, int]] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func.__name__ not in ("barrier", "monitored_barrier_"):
            name = func._schema.name.removeprefix("c10d::").strip("_")
            largest = max(_tensors(args), key=lambda tensors: sum(t.numel() for t in tensors))
            self.seen.append((self.phase, name, str(largest[0].dtype)[6:], sum(t.numel() for t in largest)))
        return func(*args, **(kwargs or {}))


def _tensors(args: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """The tensors of each argument: of a gather the whole, of a reduction what goes in, is the largest of them."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield [arg]
        elif isinstance(arg, (list, tuple)):
            flat = [t for item in arg for t in (item if isinstance(item, (list, tuple)) else [item])]
            if flat and all(isinstance(t, torch.Tensor) for t in flat):
                yield flat


class Trainer:
    """Both models and how they are updated."""

    def __init__(self, case: Case, form: str, batch: Batch):
        self.batch = batch
        cluster = ClusterConfig(sharding=form, deepspeed=case.options if form.startswith("zero") else {})
        opened = {"discriminator": Discriminator.load, "policy": Policy.load}
        self.updaters: dict[str, Updater] = {}
        for name, load in opened.items():
            module = load(Path(case.data) / name.replace("policy", "base"), dtype=getattr(torch, case.dtype))
            if case.checkpoint:
                module.checkpoint_activations()
            self.updaters[name] = open_updater(module.train(), OptimizerConfig(lr=1e-4), 100, cluster)

    def step(self, at: Callable[[str], None] = lambda phase: None) -> None:
        """As the stage's loop; ``at`` hears which part begins."""
        batch, (judge, learner) = self.batch, self.updaters.values()
        per_pack = {"tokens_per_pack": batch.tokens_per_pack}
        at("responses")
        parts = student_parts(batch.rollout, batch.chat, CONFIG)
        at("discriminator")
        given = (judge, batch.lessons, batch.rollout, parts, CONFIG)
        scores, _, _ = discriminator_gradient(*given, load=ExpertLoad(), **per_pack)
        at("discriminator's update")
        judge.step()
        at("policy")
        advantages = alignment_advantage(scores, batch.rollout.group, AdvantageConfig(), CONFIG)
        policy_gradient(learner, batch.rollout, advantages, PolicyObjective.grpo(), temperature=1.0, **per_pack)
        at("policy's update")
        learner.step()
        at("")

    def seconds(self) -> dict[str, float]:
        """A step's CPU seconds by part, and its wall time; all threads of the process count."""
        marks: list[tuple[str, float]] = []
        began = time.perf_counter()
        self.step(lambda phase: marks.append((phase, time.process_time())))
        found = {phase: after - before for (phase, before), (_, after) in pairwise(marks)}
        return {**found, "wall": time.perf_counter() - began}


@contextmanager
def alone() -> Iterator[None]:
    """What is computed here is the whole, as in one process."""
    kept = ranks.world, ranks.rank
    ranks.world, ranks.rank = lambda: 1, lambda: 0
    try:
        yield
    finally:
        ranks.world, ranks.rank = kept


def plan(batch: Batch, trainer: Trainer) -> dict[str, Any]:
    """By model: packs, turns, and costs of packs by process; and what the formulas of traffic are made of."""
    found = {}
    for name, updater in trainer.updaters.items():
        packs = batch.packs(name, updater.module)
        costs = [pack_cost(work, updater.module.dimensions) for work in Work.of_packs(packs)]
        turns = deal(costs, ranks.world())
        shares = [sum(costs[turn[rank]] for turn in turns if turn[rank] != SPARE) for rank in range(ranks.world())]
        found[name] = {"packs": len(packs), "turns": len(turns), "costs": shares, **_shapes(updater.module)}
    return found


def _shapes(module: Any) -> dict[str, Any]:
    """Shapes of parameters: ``units``, by what is gathered in one piece, layers, vision blocks, and last what is left;
    ``modules``, of what is left, by the module that is called for them (tied ones twice); ``apart``: numbers of those
    that are fp32 in a model of another dtype.
    """

    def shapes(parameters: Any) -> list[tuple[int, ...]]:
        return [tuple(getattr(p, "ds_shape", p.shape)) for p in parameters]

    leaves = [m for m in module.modules() if isinstance(m, module.gathered_at_once())]
    inside = {id(m) for leaf in leaves for m in leaf.modules()}
    taken = {id(p) for leaf in leaves for p in leaf.parameters()}
    outside = [m for m in module.modules() if id(m) not in inside]
    if isinstance(module, Discriminator):
        outside.remove(module.model.lm_head)  # which is never called
    apart = [p for name, p in module.named_parameters() if name in module.always_fp32 and module.dtype != p.dtype]
    return {
        "units": [*map(shapes, (leaf.parameters() for leaf in leaves)), shapes(_others(module, taken))],
        # transformers reads the dtype of the patch embedding's weight, which fetches it, before it calls it.
        "modules": [
            piece
            for m in outside
            if (own := shapes(m.parameters(recurse=False)))
            for piece in ([[shape] for shape in own] if isinstance(m, torch.nn.Conv3d) else [own])
        ],
        "apart": sum(p.numel() for p in apart),
    }


def _others(module: torch.nn.Module, taken: set[int]) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if id(p) not in taken]


def play(case: Case) -> dict[str, Any]:
    """The case's plan, and its CPU seconds or its traffic; a step before is not looked at."""
    batch = Batch.read(case)
    trainer = Trainer(case, case.form, batch)
    found: dict[str, Any] = {"plan": plan(batch, trainer)}
    trainer.step()
    if not case.pairs:
        with Traffic() as traffic:
            trainer.step(lambda phase: setattr(traffic, "phase", phase))
        return {**found, "traffic": traffic.seen}
    with alone():
        single = Trainer(case, "none", batch)
        found["plan alone"] = plan(batch, single)
        single.step()
    found |= {"alone": [], "among": []}
    for _ in range(case.pairs):
        ranks.gather(0)  # all begin together
        with alone():
            found["alone"].append(single.seconds())
        ranks.gather(0)
        found["among"].append(trainer.seconds())
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as a stage does
    torch.utils.deterministic.fill_uninitialized_memory = False
    cases = [Case(**case) for case in json.loads((folder / "cases.json").read_text(encoding="utf-8"))]
    with ranks.joined(timeout_minutes=5.0):
        found = [play(case) for case in cases]
        (folder / f"{ranks.rank()}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
