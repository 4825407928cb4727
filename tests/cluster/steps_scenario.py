"""Two steps of every stage's losses on made-up batches: what one process and several must find equal.

    python -m tests.cluster.steps_scenario FOLDER        reads FOLDER/cases.json, writes FOLDER/<case>.safetensors

A case: {"form": "zero2", "stage": "align", "tokens_per_pack": 60, ...}, see `Case`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prism_fast import ranks
from prism_fast.config import AdvantageConfig, ClusterConfig, DiscriminatorStep, OptimizerConfig
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.pack import pack
from prism_fast.records import Lesson, PairRecord, Rollout, Sample
from prism_fast.steps.advantage import alignment_advantage
from prism_fast.steps.discriminator_step import discriminator_gradient
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.pair_step import pair_gradient, pair_trees
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.sft_step import demonstration_trees, supervised_gradient
from prism_fast.steps.update import Backprop, Updater, open_updater
from prism_kernels import PolicyObjective
from tests.models import moe, prompt, qwen, tokens

STEPS = 2
OPTIMIZER = OptimizerConfig(lr=1e-4, clip_norm=1e9)  # so large that a first moment is 0.1 of a gradient
OBJECTIVES = {
    "grpo": PolicyObjective.grpo(),
    "dapo": PolicyObjective.dapo(),
    "gspo": PolicyObjective.gspo(),
    "dr_grpo": PolicyObjective.dr_grpo(24),
    "kl": PolicyObjective.grpo(kl_coef=0.1),
}


@dataclass(frozen=True)
class Case:
    """One thing to compute; the defaults split every group over packs, and packs over processes."""

    form: str = "none"
    stage: str = "align"
    tokens_per_pack: int = 64
    images: tuple[int, ...] = (0, 2)  # prompts that have one
    valid: tuple[bool, ...] = (True, True, False, True) * 4
    no_advantage: tuple[int, ...] = ()  # responses
    objective: str = "grpo"
    checkpoint: bool = False
    freeze: tuple[str, ...] = ()
    tie: bool = True
    dtype: str = "float32"
    break_lockstep: str = ""  # mutations: "blank", "spare", "module"
    options: dict[str, Any] = field(default_factory=dict)  # of cluster.deepspeed


def main(folder: Path) -> None:
    cases = [Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()}) for c in read(folder)]
    torch.use_deterministic_algorithms(True)
    with ranks.joined(timeout_minutes=1.0, alone="RANK" in os.environ):
        for number, case in enumerate(cases):
            found = play(case)
            if ranks.is_first():
                found = {k: v.detach().cpu().clone().contiguous() for k, v in found.items()}
                save_file(found, folder / f"{number}.safetensors")


def read(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "cases.json").read_text())


def play(case: Case) -> dict[str, Tensor]:
    """Losses, norms, scores, gradients of the first step and weights after the last, by name."""
    found: dict[str, Tensor] = {}
    models = {name: module for name, module in (("policy", policy(case)), ("discriminator", discriminator(case)))}
    if case.stage != "align":
        models.pop("discriminator" if case.stage in ("sft", "rlvr") else "policy")
    updaters = {name: updater(case, module) for name, module in models.items()}
    for step in range(STEPS):
        STAGES[case.stage](case, updaters, f"{step}", found)
        for name, each in updaters.items():
            if step == 0:
                moments = {k: v for k, v in each.tensors().items() if k.startswith("exp_avg.")}
                found |= {f"gradient.{name}.{k[8:]}": v.float() * 10 for k, v in moments.items()}
    for name, each in updaters.items():
        found |= {f"weight.{name}.{k}": v.float() for k, v in each.stream()}
    return found


def policy(case: Case) -> Policy:
    made = Policy(qwen(tie=case.tie).to(getattr(torch, case.dtype)))
    return _prepared(made, case)


def discriminator(case: Case) -> Discriminator:
    torch.manual_seed(5)
    model = moe()
    head = torch.randn(32)
    return _prepared(Discriminator(model.to(getattr(torch, case.dtype)), head), case)


def _prepared(module: Any, case: Case) -> Any:
    module.freeze(**{name: True for name in case.freeze})
    if case.checkpoint:
        module.checkpoint_activations()
    return module.train()


def updater(case: Case, module: Any) -> Updater:
    cluster = ClusterConfig(sharding=case.form, deepspeed=case.options)
    made = open_updater(module, OPTIMIZER, 10, cluster)
    if case.break_lockstep == "module":
        made.engine = module
    if case.break_lockstep in ("blank", "spare"):
        _break(case.break_lockstep)
    return made


def _break(rule: str) -> None:
    """One of the rules of own_packs.py is not kept."""
    from prism_fast.steps import own_packs

    if rule == "blank":
        own_packs.with_blank_image = lambda packed, image: packed
    else:
        Updater.lockstep = Backprop.lockstep = False
        for cls in Updater.__subclasses__():
            cls.lockstep = False


def lessons(case: Case) -> list[Lesson]:
    prompts = [prompt(i, images=((4, 4),) if i in case.images else ()) for i in range(4)]
    return [
        Lesson(Sample(f"a:{i}", (), gold="1"), p, (tokens(50 + i, 7 + i), tokens(60 + i, 9 - i)))
        for i, p in enumerate(prompts)
    ]


def rollout(case: Case) -> Rollout:
    lengths = [5 + (7 * i) % 11 for i in range(16)]
    return Rollout(
        prompts=[item.prompt for item in lessons(case)],
        group=torch.arange(4).repeat_interleave(4),
        response_ids=[tokens(100 + i, n) for i, n in enumerate(lengths)],
        logprob=[torch.full((n,), -4.5) for n in lengths],
        text=[""] * 16,
        finished=torch.ones(16, dtype=torch.bool),
    )


def parts(case: Case) -> list[tuple[Tensor, Tensor] | None]:
    return [(tokens(i, 3 + i % 3), tokens(20 + i, 4 + i % 7)) if ok else None for i, ok in enumerate(case.valid)]


def play_sft(case: Case, updaters: dict[str, Updater], step: str, found: dict[str, Tensor]) -> None:
    made = rollout(case)
    trees = demonstration_trees([(made.prompts[g], ids) for g, ids in zip(made.group.tolist(), made.response_ids)])
    each = updaters["policy"]
    loss = supervised_gradient(each, pack(trees, case.tokens_per_pack, each.module.image))
    found[f"figure.loss.{step}"] = torch.tensor(loss)
    found[f"figure.norm.{step}"] = torch.tensor(each.step())


def play_warmup(case: Case, updaters: dict[str, Updater], step: str, found: dict[str, Tensor]) -> None:
    made = [
        PairRecord(item.prompt, item.teacher, pair or (tokens(1, 4), tokens(2, 5)))
        for item, pair in zip([x for x in lessons(case) for _ in range(4)], parts(case))
    ]
    trees, labels = pair_trees(made)
    each, load = updaters["discriminator"], ExpertLoad()
    packs = pack(trees, case.tokens_per_pack, each.module.image)
    metrics, _ = pair_gradient(each, packs, labels, balance_coef=0.01, load=load)
    found |= {f"figure.{k}.{step}": torch.tensor(float(v)) for k, v in {**metrics, **load.fractions()}.items()}
    found[f"figure.norm.{step}"] = torch.tensor(each.step())


def play_align(case: Case, updaters: dict[str, Updater], step: str, found: dict[str, Tensor]) -> None:
    judge, learner = updaters["discriminator"], updaters["policy"]
    made, load = rollout(case), ExpertLoad()
    scores, metrics, _ = discriminator_gradient(
        judge, lessons(case), made, parts(case), DiscriminatorStep(), tokens_per_pack=case.tokens_per_pack, load=load
    )
    found |= {f"figure.{k}.{step}": torch.tensor(float(v)) for k, v in {**metrics, **load.fractions()}.items()}
    found |= {f"figure.{k}.{step}": v.float() for k, v in vars(scores).items()}
    found[f"figure.judge_norm.{step}"] = torch.tensor(judge.step())
    advantages = alignment_advantage(scores, made.group, AdvantageConfig(), 10.0)
    _learn(case, learner, made, advantages, None, step, found)


def play_rlvr(case: Case, updaters: dict[str, Updater], step: str, found: dict[str, Tensor]) -> None:
    made = rollout(case)
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(7))
    reference = None
    if case.objective == "kl":
        reference = Backprop(Policy(qwen(seed=3).to(getattr(torch, case.dtype))).requires_grad_(False))
    _learn(case, updaters["policy"], made, advantages, reference, step, found)


def _learn(
    case: Case, learner: Updater, made: Rollout, advantages: Tensor, reference: Any, step: str, found: dict[str, Tensor]
) -> None:
    advantages = advantages.clone()
    advantages[list(case.no_advantage)] = 0.0
    metrics, _ = policy_gradient(
        learner,
        made,
        advantages,
        OBJECTIVES[case.objective],
        temperature=1.0,
        tokens_per_pack=case.tokens_per_pack,
        reference=reference,
    )
    found |= {f"figure.policy.{k}.{step}": torch.tensor(float(v)) for k, v in metrics.items()}
    found[f"figure.policy_norm.{step}"] = torch.tensor(learner.step())


STAGES: dict[str, Callable[[Case, dict[str, Updater], str, dict[str, Tensor]], None]] = {
    "sft": play_sft,
    "warmup": play_warmup,
    "align": play_align,
    "rlvr": play_rlvr,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
