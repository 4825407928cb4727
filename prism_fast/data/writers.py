"""Writers of the four published formats. Files appear whole or not at all: written aside, then renamed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast.data.images import store_image
from prism_fast.files import replacing
from prism_fast.records import Message, Sample

ROWS_PER_GROUP = 256  # keeps random access to large images cheap

_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_RLVR = [
    ("prompt", _TURNS),
    ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ("data_source", pa.string()),
    (
        "reward_model",
        pa.struct(
            [("style", pa.string()), ("ground_truth", pa.string()), ("equivalent_answers", pa.list_(pa.string()))]
        ),
    ),
    ("extra_info", pa.struct([("index", pa.int64()), ("question_type", pa.string())])),
]
_TEACHER = [("teacher_response", pa.string()), ("teacher_caption", pa.string()), ("teacher_cot", pa.string())]


def _turns(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _paths(sample: Sample, file: Path) -> list[str]:
    return [store_image(ref, file.parent, f"{file.stem}_images") for ref in sample.images]


def _need(sample: Sample, *names: str) -> None:
    missing = [name for name in names if getattr(sample, name) is None]
    if missing:
        raise ValueError(f"{sample.place}: cannot be written without {', '.join(missing)}")


def write_sft(path: str | Path, samples: Iterable[Sample]) -> Path:
    """A LLaMA-Factory sharegpt JSON list. Images held as bytes become files in ``<name>_images`` beside it."""
    path = Path(path)
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.write("[")
        for index, sample in enumerate(samples):
            _need(sample, "response")
            record: dict[str, Any] = {
                "messages": [*_turns(sample.messages), {"role": "assistant", "content": sample.response}]
            }
            if sample.images:
                record["images"] = _paths(sample, path)
            file.write(("," if index else "") + "\n" + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")
    return path


def write_warmup(path: str | Path, samples: Iterable[Sample]) -> Path:
    """The warm-up JSON lines, parts with their tags. Images as in ``write_sft``; several of them become a list."""
    path = Path(path)
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for sample in samples:
            _need(sample, "teacher_caption", "teacher_reasoning", "student_caption", "student_reasoning")
            images = _paths(sample, path)
            single_turn = len(sample.messages) == 1
            record = {
                "prompt": sample.messages[0].content if single_turn else _turns(sample.messages),
                "image": images if len(images) > 1 else images[0] if images else None,
                "teacher_caption": sample.teacher_caption,
                "teacher_cot": sample.teacher_reasoning,
                "student_caption": sample.student_caption,
                "student_cot": sample.student_reasoning,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def write_align(path: str | Path, samples: Iterable[Sample]) -> Path:
    """The alignment parquet: prompt, images, the teacher's response whole and in parts, the gold answer."""
    return _write_parquet(Path(path), samples, teacher=True)


def write_rlvr(path: str | Path, samples: Iterable[Sample]) -> Path:
    """The RLVR parquet: the alignment file without the teacher."""
    return _write_parquet(Path(path), samples, teacher=False)


def _write_parquet(path: Path, samples: Iterable[Sample], teacher: bool) -> Path:
    schema = pa.schema(_RLVR + (_TEACHER if teacher else []))
    rows = (_row(index, sample, path, teacher) for index, sample in enumerate(samples))
    with replacing(path) as aside, pq.ParquetWriter(aside, schema) as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema))
    return path


def _row(index: int, sample: Sample, path: Path, teacher: bool) -> dict[str, Any]:
    _need(sample, *(("teacher_caption", "teacher_reasoning") if teacher else ("gold",)))
    row: dict[str, Any] = {
        "prompt": _turns(sample.messages),
        "images": [_struct(ref, path) for ref in sample.images],
        "data_source": sample.data_source,
        "reward_model": {
            "style": "rule",
            "ground_truth": sample.gold,
            "equivalent_answers": list(sample.equivalents) or None,
        },
        "extra_info": {"index": index, "question_type": sample.question_type},
    }
    if teacher:
        row["teacher_response"] = sample.teacher_caption + sample.teacher_reasoning
        row["teacher_caption"] = sample.teacher_caption
        row["teacher_cot"] = sample.teacher_reasoning
    return row


def _struct(ref: Any, file: Path) -> dict[str, Any]:
    if ref.data is not None:
        return {"bytes": ref.data, "path": None}
    return {"bytes": None, "path": store_image(ref, file.parent, f"{file.stem}_images")}
