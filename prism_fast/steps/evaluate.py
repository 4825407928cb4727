"""A policy on held-out prompts: accuracy, format validity, and how its responses are built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from scipy.stats import wasserstein_distance

from prism_fast.config import BY_THE_JUDGE, DataConfig, EvalConfig, OwnReward, Sampling
from prism_fast.data.bad_records import BadRecords
from prism_fast.data.chat import Chat
from prism_fast.data.encode import Held
from prism_fast.data.formats import read_align, read_rlvr
from prism_fast.data.images import image_uri
from prism_fast.files import write_json
from prism_fast.records import DataError, Prompt, Sample
from prism_fast.reward import count_caption_items, count_reasoning_steps
from prism_fast.steps.experience import judged
from prism_fast.steps.sampler import Sampler

SHOWN = 12  # responses kept with their images


@dataclass(frozen=True)
class EvalSet:
    """Held-out prompts with gold answers; their pixels stay in memory within data.encode.HELD_BYTES."""

    samples: list[Sample]
    prompts: Sequence[Prompt]
    skipped: list[str] = field(default_factory=list)  # messages of bad records that were passed over

    @classmethod
    def read(
        cls,
        data: DataConfig,
        files: Sequence[Path],
        limit: int | None,
        chat: Chat,
        bad: BadRecords | None = None,
    ) -> EvalSet | None:
        """The first ``limit`` good records of alignment or RLVR files; None where there are no files.

        ``bad``: the account of a command that reads other files too.
        """
        if not files:
            return None
        options = data.reading if bad is None else {**data.reading, "skip_bad": bad}
        dataset = read_rlvr(files, **options)
        encode = partial(chat.encode_prompt, max_tokens=data.max_prompt_tokens)
        prompts = Held(dataset, range(len(dataset)), encode, limit)
        if not prompts:
            raise DataError(f"{files[0]}: each of {len(dataset)} records is bad ({dataset.bad.messages[-1]})")
        return cls([dataset[index] for index in prompts.index], prompts, dataset.bad.messages)

    def __len__(self) -> int:
        return len(self.samples)


@dataclass
class Evaluation:
    """Figures of one model (or of the teacher) on an EvalSet; counts are per response, an invalid one counting 0."""

    name: str
    accuracy: float  # pass@1 of one greedy or sampled response; with k samples, the mean of k
    format_valid: float
    by_type: dict[str, dict[str, float]]
    caption_items: list[int]
    reasoning_steps: list[int]
    response_length: list[int]  # tokens
    responses: list[dict[str, Any]] = field(default_factory=list)
    samples: int = 1
    pass_at_k: float | None = None  # some response of k is right; only with k > 1
    late: int = 0  # answers without a verdict, and those beyond the judge's limits: not right, see reward/answer/
    costly: int = 0
    reward: dict[str, Any] | None = None  # the user's function that took the judge's place, as run.record.own_reward

    def figures(self) -> dict[str, float]:
        out = {"accuracy": self.accuracy, "format_valid": self.format_valid}
        if self.response_length:
            out["response_length"] = sum(self.response_length) / len(self.response_length)
        if self.pass_at_k is not None:
            out[f"pass_at_{self.samples}"] = self.pass_at_k
        out |= {"judge_late": self.late} if self.late else {}
        out |= {"judge_too_costly": self.costly} if self.costly else {}
        return out

    def write(self, path: Path) -> None:
        write_json(path, vars(self))


def evaluate(
    sampler: Sampler,
    held_out: EvalSet,
    sampling: Sampling,
    *,
    name: str = "policy",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    own: OwnReward = BY_THE_JUDGE,
) -> Evaluation:
    """Samples ``sampling.samples`` responses per prompt and judges them."""
    rollout = sampler.generate(held_out.prompts, sampling, seed=seed, progress=progress)
    samples = [held_out.samples[g] for g in rollout.group.tolist()]
    lengths = [len(ids) for ids in rollout.response_ids]
    return judge(name, samples, list(rollout.text), lengths, sampling.samples, own)


def evaluator(
    sampler: Sampler,
    chat: Chat,
    data: DataConfig,
    config: EvalConfig,
    seed: int,
    *,
    bad: BadRecords,
    own: OwnReward = BY_THE_JUDGE,
) -> Callable[[], tuple[dict[str, float], float]] | None:
    """() -> (figures, accuracy) on ``data.eval_files`` of the policy as it then is; None where there are no files.

    ``bad``: the stage's account of bad records."""
    held_out = EvalSet.read(data, data.eval_files, config.limit, chat, bad)
    if held_out is None:
        return None

    def measure() -> tuple[dict[str, float], float]:
        result = evaluate(sampler, held_out, config, seed=seed, own=own)
        return result.figures(), result.accuracy

    return measure


def judge(
    name: str, samples: list[Sample], texts: list[str], lengths: list[int], k: int = 1, own: OwnReward = BY_THE_JUDGE
) -> Evaluation:
    """Figures of given responses, k in a row for each prompt."""
    rewards = judged(texts, samples, own)
    right = [r.accuracy for r in rewards]
    by_type: dict[str, list[float]] = {}
    for sample, accuracy in zip(samples, right):
        by_type.setdefault(sample.question_type, []).append(accuracy)
    return Evaluation(
        name=name,
        accuracy=_mean(right),
        format_valid=_mean([float(r.format_valid) for r in rewards]),
        by_type={t: {"accuracy": _mean(v), "count": len(v)} for t, v in sorted(by_type.items())},
        caption_items=[count_caption_items(t) for t in texts],
        reasoning_steps=[count_reasoning_steps(t) for t in texts],
        response_length=lengths,
        responses=[_shown(i, samples[i], texts[i], rewards[i]) for i in range(0, min(len(texts), SHOWN * k), k)],
        samples=k,
        pass_at_k=_mean([max(right[i : i + k]) for i in range(0, len(right), k)]) if k > 1 else None,
        late=sum(r.late for r in rewards),
        costly=sum(r.costly for r in rewards),
    )


def judge_teacher(files: Sequence[Path], limit: int | None, chat: Chat) -> Evaluation:
    """The teacher's own responses to the held-out prompts, from an alignment file."""
    dataset = read_align(files)
    samples = [dataset[i] for i in range(min(len(dataset), limit or len(dataset)))]
    texts = [f"{s.teacher_caption}\n{s.teacher_reasoning}" for s in samples]
    return judge("teacher", samples, texts, [len(chat.encode_response(t)) for t in texts])


def drift(evaluation: Evaluation, teacher: Evaluation) -> dict[str, float]:
    """Wasserstein-1 distance of the counts per response to the teacher's."""
    return {
        "caption_items": float(wasserstein_distance(evaluation.caption_items, teacher.caption_items)),
        "reasoning_steps": float(wasserstein_distance(evaluation.reasoning_steps, teacher.reasoning_steps)),
    }


def _shown(index: int, sample: Sample, text: str, reward) -> dict[str, Any]:
    question = next((m.content for m in reversed(sample.messages) if m.role == "user"), "")
    return {
        "index": index,
        "question": question.replace("<image>", "").strip(),
        "gold": sample.gold,
        "image": image_uri(sample.images[0], sample.place) if sample.images else None,
        "response": text,
        "accuracy": reward.accuracy,
        "format_valid": reward.format_valid,
    }


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise DataError("evaluation: no responses to measure; give evaluation files with records")
    return sum(values) / len(values)
