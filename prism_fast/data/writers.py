"""Writers of the four published formats. Files appear whole or not at all: written aside, then renamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast.data.images import store_image
from prism_fast.files import replacing
from prism_fast.records import DataError, ImageRef, Message, Sample

ROWS_PER_GROUP = 256  # keeps random access to large images cheap
CONTAINERS = {".json": "a JSON list", ".jsonl": "JSON lines", ".parquet": "parquet"}

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_PROMPT = [("prompt", _TURNS), ("images", pa.list_(_IMAGE))]
_GOLD = [
    ("data_source", pa.string()),
    (
        "reward_model",
        pa.struct(
            [("style", pa.string()), ("ground_truth", pa.string()), ("equivalent_answers", pa.list_(pa.string()))]
        ),
    ),
    (
        "extra_info",
        pa.struct([("index", pa.int64()), ("question_type", pa.string()), ("pass_rate", pa.float64())]),
    ),
]
_PARTS = [(f"{voice}_{part}", pa.string()) for voice in ("teacher", "student") for part in ("caption", "cot")]
_SCHEMAS = {
    "sft": [("messages", _TURNS), ("images", pa.list_(_IMAGE))],
    "warm-up": [*_PROMPT, *_PARTS],
    "alignment": [*_PROMPT, *_GOLD, ("teacher_response", pa.string()), *_PARTS[:2]],
    "rlvr": [*_PROMPT, *_GOLD],
}


def write_sft(path: str | Path, samples: Iterable[Sample]) -> Path:
    """A LLaMA-Factory sharegpt JSON list. Images held as bytes become files in ``<name>_images`` beside it."""
    return _write("sft", ".json", Path(path), samples)


def write_warmup(path: str | Path, samples: Iterable[Sample]) -> Path:
    """The warm-up JSON lines, parts with their tags. Images as in ``write_sft``; several of them become a list."""
    return _write("warm-up", ".jsonl", Path(path), samples)


def write_align(path: str | Path, samples: Iterable[Sample]) -> Path:
    """The alignment parquet: prompt, images, the teacher's response whole and in parts, the gold answer."""
    return _write("alignment", ".parquet", Path(path), samples)


def write_rlvr(path: str | Path, samples: Iterable[Sample]) -> Path:
    """The RLVR parquet: the alignment file without the teacher."""
    return _write("rlvr", ".parquet", Path(path), samples)


def write_as(kind: str, path: Path, samples: Iterable[Sample]) -> Path:
    """Any of the formats in the container that ``path`` ends with. Raises DataError for another ending, and for a
    sample that lacks what the format holds."""
    if path.suffix not in CONTAINERS:
        raise DataError(f"{path}: expected a name that ends in {', '.join(CONTAINERS)}; choose another out")
    return _write(kind, path.suffix, path, samples)


def _write(kind: str, container: str, path: Path, samples: Iterable[Sample]) -> Path:
    with replacing(path) as aside:
        if container == ".parquet":
            schema = pa.schema(_SCHEMAS[kind])
            rows = (_RECORDS[kind](i, sample, _structs(sample, path)) for i, sample in enumerate(samples))
            with pq.ParquetWriter(aside, schema) as writer:
                while group := list(islice(rows, ROWS_PER_GROUP)):
                    writer.write_table(pa.Table.from_pylist(group, schema))
        else:
            records = (_RECORDS[kind](i, sample, _paths(sample, path)) for i, sample in enumerate(samples))
            with open(aside, "w", encoding="utf-8") as file:
                file.writelines(_lines(records, container))
    return path


def _lines(records: Iterable[dict[str, Any]], container: str) -> Iterator[str]:
    if container == ".jsonl":
        for record in records:
            yield json.dumps(record, ensure_ascii=False) + "\n"
        return
    yield "["
    for index, record in enumerate(records):
        yield ("," if index else "") + "\n" + json.dumps(record, ensure_ascii=False)
    yield "\n]\n"


def _turns(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _paths(sample: Sample, file: Path) -> list[Any]:
    return [_stored(ref, file) for ref in sample.images]


def _structs(sample: Sample, file: Path) -> list[Any]:
    return [{"bytes": ref.data, "path": None if ref.data is not None else _stored(ref, file)} for ref in sample.images]


def _stored(ref: ImageRef, file: Path) -> str:
    return store_image(ref, file.parent, f"{file.stem}_images")


def _need(sample: Sample, kind: str, *names: str) -> None:
    missing = [name for name in names if getattr(sample, name) is None]
    if missing:
        raise DataError(f"{sample.place}: has no {', '.join(missing)}, which the {kind} format holds; add it")


def _sft(index: int, sample: Sample, images: list[Any]) -> dict[str, Any]:
    _need(sample, "SFT", "response")
    record: dict[str, Any] = {"messages": [*_turns(sample.messages), {"role": "assistant", "content": sample.response}]}
    return {**record, "images": images} if images else record


def _warmup(index: int, sample: Sample, images: list[Any]) -> dict[str, Any]:
    _need(sample, "warm-up", "teacher_caption", "teacher_reasoning", "student_caption", "student_reasoning")
    parts = {
        "teacher_caption": sample.teacher_caption,
        "teacher_cot": sample.teacher_reasoning,
        "student_caption": sample.student_caption,
        "student_cot": sample.student_reasoning,
    }
    if any(isinstance(image, dict) for image in images):
        return {"prompt": _turns(sample.messages), "images": images, **parts}
    single_turn = len(sample.messages) == 1
    return {
        "prompt": sample.messages[0].content if single_turn else _turns(sample.messages),
        "image": images if len(images) > 1 else images[0] if images else None,
        **parts,
    }


def _gold(index: int, sample: Sample, images: list[Any]) -> dict[str, Any]:
    return {
        "prompt": _turns(sample.messages),
        "images": images,
        "data_source": sample.data_source,
        "reward_model": {
            "style": "rule",
            "ground_truth": sample.gold,
            "equivalent_answers": list(sample.equivalents) or None,
        },
        "extra_info": {
            "index": index,
            "question_type": sample.question_type,
            **({} if sample.pass_rate is None else {"pass_rate": sample.pass_rate}),
        },
    }


def _align(index: int, sample: Sample, images: list[Any]) -> dict[str, Any]:
    _need(sample, "alignment", "teacher_caption", "teacher_reasoning")
    return {
        **_gold(index, sample, images),
        "teacher_response": str(sample.teacher_caption) + str(sample.teacher_reasoning),
        "teacher_caption": sample.teacher_caption,
        "teacher_cot": sample.teacher_reasoning,
    }


def _rlvr(index: int, sample: Sample, images: list[Any]) -> dict[str, Any]:
    _need(sample, "RLVR", "gold")
    return _gold(index, sample, images)


_RECORDS: dict[str, Callable[[int, Sample, list[Any]], dict[str, Any]]] = {
    "sft": _sft,
    "warm-up": _warmup,
    "alignment": _align,
    "rlvr": _rlvr,
}
