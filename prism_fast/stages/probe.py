"""`prism-fast probe`: a policy's responses, the discriminator's scores of them, and what is right in each."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prism_fast import metric_names as names
from prism_fast.config import ProbeConfig
from prism_fast.data.encode import encoded, lesson
from prism_fast.data.formats import read_align
from prism_fast.files import try_new, write_json
from prism_fast.models.load import load_discriminator, open_policy
from prism_fast.records import DataError
from prism_fast.run.alerts import style_alone
from prism_fast.stages.answers import Progress
from prism_fast.steps.discriminator_step import score_responses, student_parts
from prism_fast.steps.probe import Side, content_figures, right_parts, sides
from prism_fast.steps.sampler import open_sampler
from prism_fast.steps.update import Backprop

PROMPTS = 64  # whose pixels are in memory at once


def probe(config: ProbeConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Writes config.out and returns it: `steps.probe.content_figures` of each side, and alerts."""
    try_new(config.out)
    policy, chat = open_policy(config.policy)
    discriminator = Backprop(load_discriminator(config.discriminator, chat=chat))
    discriminator.module.eval()
    data = read_align(config.data.files, **config.data.reading)
    total = min(len(data), config.limit or len(data))
    encode = partial(lesson, chat=chat, max_prompt_tokens=config.data.max_prompt_tokens, config=config, needs_gold=True)
    found: dict[str, list[Side]] = {side: [] for side in names.SIDES}
    prompts = responses = 0
    with closing(open_sampler(config.sampler, Backprop(policy), chat)) as sampler:
        for start in range(0, total, PROMPTS):
            lessons = [made for _, made in encoded(data, range(start, min(start + PROMPTS, total)), encode)]
            if not lessons:
                continue
            rollout = sampler.generate([item.prompt for item in lessons], config, seed=config.seed * 1_000_003 + start)
            parts = student_parts(rollout, chat, config)
            given = (discriminator, lessons, rollout, parts, config)
            scores = score_responses(*given, tokens_per_pack=config.tokens_per_pack)
            asked = [lessons[group].sample for group in rollout.group.tolist()]
            right = [right_parts(text, sample, config.truth == "teacher") for text, sample in zip(rollout.text, asked)]
            for name, side in sides(rollout, scores, parts, torch.tensor(right).T).items():
                found[name].append(side._replace(group=side.group + start))
            prompts, responses = prompts + len(lessons), responses + len(rollout)
            if progress is not None:
                progress(responses, total * config.samples)
    if not responses:
        raise DataError(f"{config.data.files[0]}: each of {total} records is bad ({data.bad.messages[-1]})")
    whole = {name: Side(*map(torch.cat, zip(*each))) for name, each in found.items()}
    result = _result(config, whole, prompts, responses)
    write_json(config.out, result, indent=1)
    return result


def _result(config: ProbeConfig, whole: dict[str, Side], prompts: int, responses: int) -> dict[str, Any]:
    figures = {name: {**content_figures(side), "right": _share(side.right)} for name, side in whole.items()}
    alerts = [text for name, each in figures.items() if (text := style_alone(name, each)) is not None]
    return {
        "truth": config.truth,
        "prompts": prompts,
        "responses": responses,
        "valid": len(whole["perception"].score),
        **figures,
        "alerts": alerts,
    }


def _share(right: Tensor) -> float:
    return float(right.float().mean()) if len(right) else 0.0
