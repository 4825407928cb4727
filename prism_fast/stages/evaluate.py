"""`prism-fast eval`: a policy's responses to held-out prompts, and what the judge or a function of one's own says."""

from __future__ import annotations

from prism_fast.config import EvaluateConfig
from prism_fast.data.formats import read_rlvr
from prism_fast.files import try_new
from prism_fast.reward import started
from prism_fast.run.record import own_reward
from prism_fast.stages.answers import Progress, answers
from prism_fast.stages.kept_answers import partial_file
from prism_fast.steps.evaluate import EvalSet, Evaluation, judge


def evaluate_policy(config: EvaluateConfig, progress: Progress) -> tuple[Evaluation, EvalSet]:
    """Evaluates config.model and writes config.out, which must be new; (figures, the records they are of)."""
    try_new(config.out)
    own, k = own_reward(config.reward), config.eval.samples
    data = read_rlvr(config.data.files, **config.data.reading)
    with started(config.reward):
        answered = answers(
            config, data, config.eval, picked=range(len(data)), limit=config.eval.limit, progress=progress
        )
        samples = [data[index] for index, _, _ in answered]
        texts = [text for each in answered for text in each.texts]
        lengths = [length for each in answered for length in each.lengths]
        asked = [sample for sample in samples for _ in range(k)]
        result = judge(config.model.path.name, asked, texts, lengths, k, config.reward)
    result.reward = own
    result.write(config.out)
    partial_file(config.out).unlink(missing_ok=True)
    return result, EvalSet(samples, (), data.bad.messages)
