"""Engines and batches that are sampled ahead, in several processes: what each of them sees, as JSON.

python -m tests.cluster.engine_scenario FOLDER        writes FOLDER/RANK.json, results by the names of `CASES`
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from prism_fast import ranks
from prism_fast.config import ClusterConfig, OptimizerConfig, Sampling
from prism_fast.models.policy import Policy
from prism_fast.records import DataError, Rollout
from prism_fast.steps.ahead import Ahead
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.sampler import SnapshotSampler
from prism_fast.steps.sampler_engine import EngineSampler, log_prob_gap
from prism_fast.steps.sampler_shares import Response
from prism_fast.steps.update import Updater, open_updater
from prism_kernels import PolicyObjective
from tests.fake_engine import FakeEngine
from tests.models import prompt
from tests.trainer.steps.test_sampler import Chat, policy

# The first is long: a process gets it alone, or parts of the others' groups.
PROMPTS = [prompt(1, images=((4, 4),)), prompt(2), prompt(3, text=20)]
SAMPLING = Sampling(samples=4, max_response_tokens=10, temperature=0.9)
STEPS = 4


def main(folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    with ranks.joined(timeout_minutes=1.0):
        found = {name: case() for name, case in CASES.items()}
        (folder / f"{ranks.rank()}.json").write_text(json.dumps(found))


def run(form: str, engine: bool, overlap: int, fault: str | None = None) -> dict[str, Any]:
    """Steps of one policy, the responses of each, and what this process's engine was asked for.

    ``fault``: of the second process's engine alone; of the batch of step 1 where that is sampled ahead.
    """
    made = policy(of=30)
    start = copy.deepcopy(made)
    updater = open_updater(made, OptimizerConfig(lr=1e-2), STEPS, ClusterConfig(sharding=form))
    engine_of = FakeEngine(start, Chat, fault if ranks.rank() == 1 and not overlap else None)
    sampler = EngineSampler(engine_of, updater, Chat, print) if engine else SnapshotSampler(start, Chat)
    config = SimpleNamespace(rollout=SimpleNamespace(overlap=overlap), steps=STEPS, cluster=ClusterConfig())
    ahead: Ahead[Rollout] = Ahead(sampler, Chat, config, print)  # type: ignore[arg-type]
    asked, beside, batches, gaps = count_requests(engine_of), [], [], []

    def draw(step: int, before: Rollout | None) -> Rollout:
        if step == 1 and ranks.rank() == 1:
            engine_of.fault = fault
        beside.append(threading.current_thread() is not threading.main_thread())
        return ahead.generate(PROMPTS, SAMPLING, seed=step)

    older = whole(updater, start)
    try:
        for step in range(STEPS):
            now = whole(updater, start)
            batch = ahead.take(draw, step)
            gaps.append(gap(older if overlap else now, batch))
            batches.append(batch)
            advantages = torch.tensor([1.0, -1.0] * 6)
            objective = PolicyObjective.grpo(importance_cap=2.0)
            given = {"temperature": SAMPLING.temperature, "tokens_per_pack": 60, "off_policy": overlap > 0}
            policy_gradient(updater, batch, advantages, objective, **given)
            updater.step()
            ahead.give(updater.stream(), step + 1)
            older = now
    except DataError as error:
        return {"fault": str(error), "steps": len(batches)}
    return {
        "batches": [digest(batch) for batch in batches],
        "gaps": gaps,
        "asked": asked,
        "beside": beside,
        "tokens_by_rank": [batch.tokens_by_rank for batch in batches],
        "weights": {name: float(value.double().abs().sum()) for name, value in updater.stream()},
    }


def whole(updater: Updater, like: Policy) -> Policy:
    """A copy of the policy as it now is."""
    made = copy.deepcopy(like)
    with torch.no_grad():
        for name, value in updater.stream():
            made.get_parameter(name).copy_(value)
    return made


def gap(module: Policy, batch: Rollout) -> float:
    """The largest of any token of the batch."""
    found = []
    for group, each in enumerate(batch.prompts):
        rows = range(SAMPLING.samples * group, SAMPLING.samples * (group + 1))
        responses = [Response(batch.response_ids[i], batch.logprob[i]) for i in rows]
        found.append(float(log_prob_gap(module, each, responses, SAMPLING.temperature).max()))
    return max(found)


def digest(batch: Rollout) -> str:
    numbers = torch.cat([torch.cat(list(batch.response_ids)).double(), torch.cat(list(batch.logprob)).double()])
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


def count_requests(engine: FakeEngine) -> list[int]:
    """Responses that an engine is asked for, by call."""
    asked: list[int] = []
    real = engine.generate

    def generate(requests: Any, *rest: Any) -> Any:
        asked.append(sum(request.samples for request in requests))
        return real(requests, *rest)

    engine.generate = generate
    return asked


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "engine": lambda: run("none", True, 0),
    "engine ahead, fsdp2": lambda: run("fsdp2", True, 1),
    "copy ahead": lambda: run("none", False, 1),
    "copy ahead, fsdp2": lambda: run("fsdp2", False, 1),
    "dead": lambda: run("none", True, 0, "dead"),
    "dead ahead": lambda: run("none", True, 1, "dead"),
    "dies in a push": lambda: run("none", True, 0, "dies in a push"),
    "shifted": lambda: run("none", True, 0, "shifted"),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
