"""Two steps of every stage's losses on made-up batches: what one process and several must find equal.

    python -m tests.cluster.steps_scenario FOLDER        reads FOLDER/cases.json, writes FOLDER/<case>.safetensors

A case: {"form": "zero2", "stage": "align", "tokens_per_pack": 60, ...}, see `Case`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prism_fast import ranks
from prism_fast.config import AdvantageConfig, ClusterConfig, DiscriminatorStep, OptimizerConfig, Sampling
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.records import Lesson, PairRecord, Rollout, Sample
from prism_fast.steps.advantage import alignment_advantage
from prism_fast.steps.discriminator_step import discriminator_gradient
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.pair_step import pair_gradient, pair_packs
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.sampler import generate
from prism_fast.steps.sft_step import demonstration_packs, supervised_gradient
from prism_fast.steps.update import Backprop, Updater, open_updater
from prism_kernels import PolicyObjective
from tests.models import EOS, moe, prompt, question, qwen, tokens

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
    packed_for: int | None = None  # processes that supervised packs are planned for; None: as many as there are
    images: tuple[int, ...] = (0, 2)  # prompts that have one
    valid: tuple[bool, ...] = (True, True, False, True) * 4
    no_advantage: tuple[int, ...] = ()  # responses
    objective: str = "grpo"
    checkpoint: bool = False
    freeze: tuple[str, ...] = ()
    tie: bool = True
    dtype: str = "float32"
    dropout: float = 0.0  # of the discriminator's head
    discard: str = ""  # before the first step: "nothing", or a "backward" whose gradients are thrown away
    infinite: bool = False  # the first step's advantage of response 0
    sample: bool = False  # responses are sampled before each step
    resident: bool = False  # count weights that are there inside of a layer, and after a step
    offload: bool = False  # the optimizer's state is on the host
    moments: str = "float32"
    no_memory: bool = False  # runs out in the last process, in the middle of its first backward of each model
    break_lockstep: str = ""  # mutations: "blank", "spare", "module"
    options: dict[str, Any] = field(default_factory=dict)  # of cluster.deepspeed


def main(folder: Path) -> None:
    cases = [Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()}) for c in read(folder)]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as a stage has it
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
    short = case.no_memory and ranks.rank() == ranks.world() - 1
    for module in models.values() if short else ():
        _run_out_of_memory(module)
    if case.discard:
        for each in updaters.values():
            each.next_step()
    if case.discard == "backward":
        for each in updaters.values():
            each.steps -= 1
        _throw_away(case, updaters)
    for step in range(STEPS):
        if case.sample:
            found |= sampled(updaters["policy"], f"{step}")
        with counting(case, updaters) as resident:
            STAGES[case.stage](case, updaters, f"{step}", found)
        for each in updaters.values():
            assert each.halved == (short and step == 0), each.halved
            each.figures()
        found |= {f"resident.{name}.{step}": torch.tensor(counts) for name, counts in resident.items()}
        for name, each in updaters.items():
            if step == 0:
                kept = each.tensors()
                assert ranks.is_first() or not kept, "a checkpoint's tensors are the first process's alone"
                moments = {k: v for k, v in kept.items() if k.startswith("exp_avg.")}
                found |= {f"gradient.{name}.{k[8:]}": v.float() * 10 for k, v in moments.items()}
    for name, each in updaters.items():
        found |= {f"weight.{name}.{k}": v.float() for k, v in each.stream()}
    return found


def _run_out_of_memory(module: Any) -> None:
    calls = iter(range(1 << 30))

    def fail(gradient: Tensor) -> None:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def on_the_way_back(layer: Any, args: Any, out: tuple[Tensor, ...]) -> None:
        if out[0].requires_grad:
            out[0].register_hook(fail)

    module.text.layers[1].register_forward_hook(on_the_way_back)


def _throw_away(case: Case, updaters: dict[str, Updater]) -> None:
    """A step's gradients that are not used."""
    made = rollout(case)
    if "policy" in updaters:
        policy_gradient(
            updaters["policy"],
            made,
            torch.ones(16),
            OBJECTIVES["grpo"],
            temperature=1.0,
            tokens_per_pack=case.tokens_per_pack,
        )
    if "discriminator" in updaters:
        given = (updaters["discriminator"], lessons(case), made, parts(case), DiscriminatorStep())
        discriminator_gradient(*given, tokens_per_pack=case.tokens_per_pack, load=ExpertLoad())
    for each in updaters.values():
        each.next_step()


class Letters:
    """As much of a chat format as sampling needs."""

    end_of_turn_id = EOS

    def decode(self, ids: Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


def sampled(each: Updater, step: str) -> dict[str, Tensor]:
    """Responses of the policy as it now is, and a checksum of its weights by its stream."""
    prompts = [prompt(i, images=((4, 4),) if i == 1 else ()) for i in range(3)]
    sampling = Sampling(samples=4, max_response_tokens=6, rows_at_once=8)
    with each.gathered():
        made = generate(each.module, Letters(), prompts, sampling, seed=4)  # type: ignore[arg-type]
    sums = {f"figure.stream.{name}.{step}": value.double().abs().sum() for name, value in each.stream()}
    return {
        f"sampled.ids.{step}": torch.cat(list(made.response_ids)),
        f"sampled.lengths.{step}": torch.tensor([len(x) for x in made.response_ids]),
        f"figure.logprob.{step}": torch.cat(list(made.logprob)),
        **sums,
    }


@contextmanager
def counting(case: Case, updaters: dict[str, Updater]) -> Iterator[dict[str, list[int]]]:
    """Numbers of weights that are there: inside of every call of a layer, then after the step; by model."""
    found: dict[str, list[int]] = {}
    handles = []
    for name, each in updaters.items() if case.resident else ():
        counts = found[name] = []

        def count(layer: Any, args: Any, out: Any, module: Any = each.module, counts: list[int] = counts) -> None:
            counts.append(sum(ranks.local(p.detach()).numel() for p in module.parameters()))

        handles += [m.register_forward_hook(count) for m in layers(each.module)]
    yield found
    for handle in handles:
        handle.remove()
    for name, counts in found.items():
        module = updaters[name].module
        counts.append(sum(ranks.local(p.detach()).numel() for p in module.parameters()))


def layers(module: Any) -> list[Any]:
    """What is inside of a layer: its attention, whose end is before the layer's own."""
    return [layer.self_attn for layer in module.text.layers]


def policy(case: Case) -> Policy:
    made = Policy(qwen(tie=case.tie).to(getattr(torch, case.dtype)))
    return _prepared(made, case)


def discriminator(case: Case) -> Discriminator:
    torch.manual_seed(5)
    model = moe()
    head = torch.randn(32)
    return _prepared(Discriminator(model.to(getattr(torch, case.dtype)), head, dropout=case.dropout), case)


def _prepared(module: Any, case: Case) -> Any:
    module.freeze(**{name: True for name in case.freeze})
    if case.checkpoint:
        module.checkpoint_activations()
    return module.train()


def updater(case: Case, module: Any) -> Updater:
    options = case.options
    if case.form.startswith("zero"):  # by default each engine's bucket takes 0.8 GB, whatever the model's size
        options = {"zero_optimization": {"reduce_bucket_size": 2_000_000, **options.get("zero_optimization", {})}}
    cluster = ClusterConfig(sharding=case.form, deepspeed=options)
    made = open_updater(
        module, OPTIMIZER.model_copy(update={"offload": case.offload, "moments": case.moments}), 10, cluster
    )
    if case.break_lockstep:
        _break(case.break_lockstep)
    return made


def _break(rule: str) -> None:
    """One of the rules of own_packs.py and of an updater's call is not kept."""
    from prism_fast.steps import own_packs

    if rule == "blank":
        own_packs.with_blank_image = lambda packed, image: packed
    for cls in Updater.__subclasses__():
        if rule == "spare":
            cls.lockstep = False
        if rule == "module":
            cls.__call__ = Backprop.__call__  # the model's own, which no engine sees


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
    made, each = rollout(case), updaters["policy"]
    told = [(made.prompts[g], ids) for g, ids in zip(made.group.tolist(), made.response_ids)]
    told += [(question((1,), i), tokens(i, 5)) for i in range(5)]  # which share a picture
    packs = demonstration_packs(told, case.tokens_per_pack, each.module, world=case.packed_for)
    found[f"packs.{step}"] = torch.tensor([packs.tokens(number) for number in range(len(packs))])
    loss = supervised_gradient(each, packs)
    found[f"figure.loss.{step}"] = torch.tensor(loss)
    found[f"figure.norm.{step}"] = torch.tensor(each.step())


def play_warmup(case: Case, updaters: dict[str, Updater], step: str, found: dict[str, Tensor]) -> None:
    made = [
        PairRecord(item.prompt, item.teacher, pair or (tokens(1, 4), tokens(2, 5)))
        for item, pair in zip([x for x in lessons(case) for _ in range(4)], parts(case))
    ]
    made += [PairRecord(question((1,), i), *[(tokens(v + i, 4), tokens(v, 5)) for v in (2, 9)]) for i in range(3)]
    each, load = updaters["discriminator"], ExpertLoad()
    packs, labels = pair_packs(made, case.tokens_per_pack, each.module)
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
    advantages = alignment_advantage(scores, made.group, AdvantageConfig(), DiscriminatorStep())
    _learn(case, learner, made, advantages, None, step, found)


def play_rlvr(case: Case, updaters: dict[str, Updater], step: str, found: dict[str, Tensor]) -> None:
    made = rollout(case)
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(7))
    if case.infinite and step == "0":
        advantages[0] = torch.inf
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
