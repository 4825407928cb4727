"""`prism-fast eval`: a policy's responses to held-out prompts, and what the judge or a function of one's own says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from prism_fast.config import EvaluateConfig
from prism_fast.files import try_new
from prism_fast.models.load import open_policy
from prism_fast.reward import started
from prism_fast.run.record import own_reward
from prism_fast.steps.evaluate import EvalSet, Evaluation, evaluate
from prism_fast.steps.sampler import open_sampler
from prism_fast.steps.update import Backprop

Progress = Callable[[int, int], None]  # (responses done, responses in total)


def evaluate_policy(config: EvaluateConfig, progress: Progress) -> tuple[Evaluation, EvalSet]:
    """Evaluates config.model and writes config.out, which must be new; (figures, the prompts they are of)."""
    try_new(config.out)
    own = own_reward(config.reward)
    with started(config.reward):
        policy, chat = open_policy(config.model)
        held_out = EvalSet.read(config.data, config.data.files, config.eval.limit, chat)
        assert held_out is not None  # there is a file, or the configuration is refused
        total = len(held_out) * config.eval.samples
        with closing(open_sampler(config.sampler, Backprop(policy), chat)) as sampler:
            result = evaluate(
                sampler,
                held_out,
                config.eval,
                name=config.model.path.name,
                seed=config.seed,
                progress=lambda done: progress(done, total),
                own=config.reward,
            )
    result.reward = own
    result.write(config.out)
    return result, held_out
