"""A discriminator that learns while it scores, as the reward functions of another trainer: TRL's GRPOTrainer.

One packed forward and backward per batch gives the scores and the discriminator's own update, as in the adversarial
stage; the first reward function that is asked runs it, and the others read what it found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from prism_fast import metric_names as names
from prism_fast import ranks
from prism_fast.config import DiscriminatorStep, ModelConfig, OptimizerConfig
from prism_fast.data.chat import IMAGE
from prism_fast.data.encode import encoded, lesson
from prism_fast.data.formats import Dataset
from prism_fast.data.images import open_image
from prism_fast.files import write_aside
from prism_fast.models.load import open_discriminator, with_chat
from prism_fast.records import DataError, Lesson, Rollout, Scores
from prism_fast.steps.backprop import Backprop
from prism_fast.steps.discriminator_step import discriminator_gradient, not_finite, student_parts
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.updater import Updater

OPTIMIZER_FILE = "optimizer.safetensors"


class DiscriminatorReward:
    """``perception``, ``reasoning`` and ``format_valid``: reward functions by TRL's signature.

    >>> judge = DiscriminatorReward(path, read_align([file]), optimizer=OptimizerConfig(lr=1e-4), steps=200)
    >>> GRPOTrainer(model, reward_funcs=[judge.perception, judge.reasoning, judge.format_valid],
    ...             train_dataset=Dataset.from_list(list(judge.rows())), callbacks=[judge.saver()])

    A row of the dataset carries ``record``, its number in ``data``: that links a response to its teacher, whatever the
    order. Under ``torch.no_grad`` (an evaluation) responses are scored, and nothing is learned. Where there are several
    processes, each of them gives its own responses; the batch is that of all, packs are shared out, gradients added up.
    """

    def __init__(
        self,
        path: str | Path,
        data: Dataset,
        *,
        optimizer: OptimizerConfig,
        steps: int,
        config: DiscriminatorStep | None = None,
        dtype: str = "auto",
        tokens_per_pack: int = 16_384,
        max_prompt_tokens: int = 8_192,
    ):
        """``path``: the discriminator, with its chat format; one that :meth:`save` wrote goes on where it was.

        ``data``: records of the alignment format (`data.formats.read_align`). ``steps``: of the learning rate's
        schedule. Raises DataError for a folder or records that cannot be used.
        """
        module, self.chat = open_discriminator(ModelConfig.model_validate({"path": str(path), "dtype": dtype}))
        self.data, self.config = data, config or DiscriminatorStep.model_validate({})
        self.tokens_per_pack, self.max_prompt_tokens = tokens_per_pack, max_prompt_tokens
        self.updater = Updater(module, optimizer, steps)
        kept = Path(path) / OPTIMIZER_FILE
        if kept.exists():
            tensors = load_file(kept)
            self.updater.load(tensors, int(tensors.pop("steps")))
        self._found: tuple[Any, Scores] | None = None  # (the responses, their scores) of the last batch
        self._unread: set[str] = set()

    def perception(self, *, completion_ids: Sequence[Sequence[int]], record: Sequence[int], **columns: Any) -> list:
        """Scores of the captions, within +-score_clamp; None where the format is invalid."""
        return self._side("perception", completion_ids, record, columns)

    def reasoning(self, *, completion_ids: Sequence[Sequence[int]], record: Sequence[int], **columns: Any) -> list:
        """Scores of the reasonings, likewise."""
        return self._side("reasoning", completion_ids, record, columns)

    def format_valid(self, *, completion_ids: Sequence[Sequence[int]], record: Sequence[int], **columns: Any) -> list:
        """1.0 or 0.0."""
        return self._scores("format_valid", completion_ids, record, columns).format_valid.float().tolist()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The records as TRL's dataset wants them: ``prompt`` (messages of parts), ``images``, ``record``."""
        for number, sample in enumerate(self.data):
            yield {
                "prompt": [{"role": m.role, "content": _parts(m.content)} for m in sample.messages],
                "images": [open_image(ref, sample.place) for ref in sample.images],
                "record": number,
            }

    def save(self, path: str | Path) -> None:
        """Model, chat format and optimizer, to go on from; the first process writes."""
        tensors = self.updater.tensors()
        if not ranks.is_first():
            return
        tensors["steps"] = torch.tensor(self.updater.steps)

        def write(folder: Path) -> None:
            with_chat(self.updater.module, self.chat)(folder)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / OPTIMIZER_FILE)

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_aside(Path(path), write)

    def saver(self) -> TrainerCallback:
        """A callback that saves into each of the trainer's checkpoints, and into ``output_dir`` at the end."""
        return _Saver(self.save)

    def _side(self, side: str, ids: Sequence[Sequence[int]], record: Sequence[int], columns: dict[str, Any]) -> list:
        scores, clamp = self._scores(side, ids, record, columns), self.config.score_clamp
        values = getattr(scores, side).clamp(-clamp, clamp).tolist()
        return [value if valid else None for value, valid in zip(values, scores.format_valid.tolist())]

    def _scores(
        self, reader: str, ids: Sequence[Sequence[int]], record: Sequence[int], columns: dict[str, Any]
    ) -> Scores:
        """Of this process's responses; learned from once, whoever reads them first."""
        batch = ([int(number) for number in record], [[int(i) for i in row] for row in ids], torch.is_grad_enabled())
        if self._found is None or self._found[0] != batch or reader not in self._unread:
            self._found = (batch, self._judge(*batch, columns.get("log_metric", _unlogged)))
            self._unread = {"perception", "reasoning", "format_valid"}
        self._unread.discard(reader)
        return self._found[1]

    def _judge(self, record: list[int], ids: list[list[int]], learn: bool, log: Callable[[str, float], None]) -> Scores:
        batch = ranks.gather([record, ids])
        records = [number for theirs, _ in batch for number in theirs]
        asked = list(dict.fromkeys(records))
        if outside := [number for number in asked if not 0 <= number < len(self.data)]:
            last = len(self.data) - 1
            raise DataError(f"reward functions: record: expected the number of one, 0 to {last}, got {outside[0]}")
        encode = partial(lesson, chat=self.chat, max_prompt_tokens=self.max_prompt_tokens, config=self.config)
        lessons = [made for _, made in encoded(self.data, asked, encode)]
        if len(lessons) != len(asked):
            raise DataError("reward functions: a record of the batch is bad; read the data without skip_bad")
        group = torch.tensor([asked.index(number) for number in records])
        rollout = self._rollout(lessons, group, [row for _, theirs in batch for row in theirs])
        parts = student_parts(rollout, self.chat, self.config)
        updater = self.updater if learn else _ScoresOnly(self.updater.module)
        with torch.set_grad_enabled(learn):
            scores, metrics, _ = discriminator_gradient(
                updater, lessons, rollout, parts, self.config, tokens_per_pack=self.tokens_per_pack, load=ExpertLoad()
            )
        fault = not_finite(scores, rollout, lessons)
        if fault is not None:
            warnings.warn(f"discriminator: {fault}; the batch is not learned from, and counts as invalid", stacklevel=2)
            scores = replace(scores, format_valid=torch.zeros_like(scores.format_valid))
            if learn:
                self.updater.next_step()
        elif learn:
            for name, value in {**metrics, names.DISCRIMINATOR_GRAD_NORM: self.updater.step()}.items():
                log(name, value)
        first = sum(len(theirs) for theirs, _ in batch[: ranks.rank()])
        mine = slice(first, first + len(record))
        own = {side: getattr(scores, side)[mine] for side in ("perception", "reasoning", "format_valid")}
        return replace(scores, **own)

    def _rollout(self, lessons: Sequence[Lesson], group: Tensor, ids: Sequence[Sequence[int]]) -> Rollout:
        """Responses as the discriminator's step reads them; one with ids that no token has is empty, and so invalid."""
        known = [min(row, default=0) >= 0 and max(row, default=0) < self.chat.vocab_size for row in ids]
        rows = [torch.tensor(row if fits else [], dtype=torch.int64) for row, fits in zip(ids, known)]
        return Rollout(
            prompts=[item.prompt for item in lessons],
            group=group,
            response_ids=rows,
            logprob=[torch.zeros(len(row)) for row in rows],  # the sampler's, which nothing reads here
            text=[self.chat.decode(row) for row in rows],
            finished=torch.tensor([self.chat.end_of_turn_id in row for row in ids]),
        )


def _unlogged(name: str, value: float) -> None:
    pass


class _ScoresOnly(Backprop):
    """A step's forward, of whose loss nothing is made."""

    def backward(self, loss: Tensor) -> None:
        pass


class _Saver(TrainerCallback):
    def __init__(self, save: Callable[[Path], None]):
        self.save = save

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "discriminator")

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.save(Path(args.output_dir) / "discriminator")


def _parts(content: str) -> list[dict[str, str]]:
    """A message's text and images as parts; every part has the same keys, as a dataset's columns must."""
    parts = []
    for number, text in enumerate(content.split(IMAGE)):
        parts += [{"type": "image", "text": ""}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts
