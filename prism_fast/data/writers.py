"""Writers of the four published formats and of LLaVA's. Files appear whole or not at all: written aside,
then renamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast.data.stored import Stored, within
from prism_fast.files import replacing, write_aside
from prism_fast.records import DataError, Message, Sample

ROWS_PER_GROUP = 256
GROUP_BYTES = 8 << 20  # of images: keeps random access to them cheap, and memory small
SHARD_BYTES = 512 << 20  # of images, in a file of a folder
CONTAINERS = {".json": "a JSON list", ".jsonl": "JSON lines", ".parquet": "parquet"}

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SHAREGPT = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
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
_FIELDS = {
    "sft": [("messages", _TURNS), ("images", pa.list_(_IMAGE))],
    "warm-up": [*_PROMPT, *_PARTS],
    "alignment": [*_PROMPT, *_GOLD, ("teacher_response", pa.string()), *_PARTS[:2]],
    "rlvr": [*_PROMPT, *_GOLD],
    "llava": [("id", pa.string()), ("image", pa.list_(_IMAGE)), ("conversations", _SHAREGPT)],
}
_SCHEMAS = {kind: pa.schema(fields) for kind, fields in _FIELDS.items()}


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
    """Any of the formats, or "llava", LLaVA's conversations, in the container that ``path`` ends with; without an
    ending a folder, by `write_shards`. Raises DataError for another ending, and for a sample that lacks what the format
    holds."""
    if not path.suffix:
        return write_shards(kind, path, samples)
    if path.suffix not in CONTAINERS:
        raise DataError(
            f"{path}: expected a name that ends in {', '.join(CONTAINERS)}, or a folder's; choose another out"
        )
    return _write(kind, path.suffix, path, samples)


def write_shards(kind: str, folder: Path, samples: Iterable[Sample]) -> Path:
    """Any of the formats as a folder of parquet files, ``train-00000-of-00002.parquet``, with all images in bytes: what
    the library datasets loads from a folder. An earlier folder is replaced."""

    def write(aside: Path) -> None:
        rows = _groups(_RECORDS[kind](i, sample, within(sample)) for i, sample in enumerate(samples))
        made: list[Path] = []
        for group, size in rows:
            made.append(aside / f"{len(made)}")
            with pq.ParquetWriter(made[-1], _SCHEMAS[kind], write_page_checksum=True) as writer:
                writer.write_table(pa.Table.from_pylist(group, _SCHEMAS[kind]))
                while size < SHARD_BYTES and (more := next(rows, None)):
                    writer.write_table(pa.Table.from_pylist(more[0], _SCHEMAS[kind]))
                    size += more[1]
        for number, file in enumerate(made):
            file.rename(aside / f"train-{number:05}-of-{len(made):05}.parquet")

    write_aside(folder, write)
    return folder


def _write(kind: str, container: str, path: Path, samples: Iterable[Sample]) -> Path:
    with replacing(path) as aside, Stored(path) as images:
        if container == ".parquet":
            rows = (_RECORDS[kind](i, sample, images.structs(sample)) for i, sample in enumerate(samples))
            with pq.ParquetWriter(aside, _SCHEMAS[kind], write_page_checksum=True) as writer:
                for group, _ in _groups(rows):
                    writer.write_table(pa.Table.from_pylist(group, _SCHEMAS[kind]))
        else:
            records = (_RECORDS[kind](i, sample, images.paths(sample)) for i, sample in enumerate(samples))
            with open(aside, "w", encoding="utf-8") as file:
                file.writelines(_lines(records, container))
    return path


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """(rows of a row group, bytes of their images): at most ROWS_PER_GROUP rows and about GROUP_BYTES."""
    group, size = [], 0
    for row in rows:
        group.append(row)
        held = row.get("images") or row.get("image") or []
        size += sum(len(image["bytes"] or b"") for image in held)
        if len(group) == ROWS_PER_GROUP or size >= GROUP_BYTES:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


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


_TEACHER, _STUDENT = ("teacher_caption", "teacher_reasoning"), ("student_caption", "student_reasoning")
NEEDED = {  # fields of a sample that a format cannot be written without
    "sft": ("response",),
    "llava": ("response",),
    "warm-up": (*_TEACHER, *_STUDENT),
    "alignment": _TEACHER,
    "rlvr": ("gold",),
}


def refuse_lacking(kind: str, sample: Sample) -> None:
    """Raises DataError, naming what is missing, for a sample that cannot be written as ``kind``."""
    if missing := [name for name in NEEDED[kind] if getattr(sample, name) is None]:
        name = {"sft": "SFT", "llava": "LLaVA", "rlvr": "RLVR"}.get(kind, kind)
        raise DataError(f"{sample.place}: has no {', '.join(missing)}, which the {name} format holds; add it")


def _sft(index: int, sample: Sample, images: list[Any]) -> dict[str, Any]:
    refuse_lacking("sft", sample)
    record: dict[str, Any] = {"messages": [*_turns(sample.messages), {"role": "assistant", "content": sample.response}]}
    return {**record, "images": images} if images else record


def _llava(index: int, sample: Sample, images: list[Any]) -> dict[str, Any]:
    refuse_lacking("llava", sample)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[message.role], "value": message.content} for message in sample.messages]
    record = {"id": str(index), "conversations": [*turns, {"from": "gpt", "value": sample.response}]}
    if not images:
        return record
    single = len(images) == 1 and isinstance(images[0], str)
    return {**record, "image": images[0] if single else images}


def _warmup(index: int, sample: Sample, images: list[Any]) -> dict[str, Any]:
    refuse_lacking("warm-up", sample)
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
    refuse_lacking("alignment", sample)
    return {
        **_gold(index, sample, images),
        "teacher_response": str(sample.teacher_caption) + str(sample.teacher_reasoning),
        "teacher_caption": sample.teacher_caption,
        "teacher_cot": sample.teacher_reasoning,
    }


def _rlvr(index: int, sample: Sample, images: list[Any]) -> dict[str, Any]:
    refuse_lacking("rlvr", sample)
    return _gold(index, sample, images)


_RECORDS: dict[str, Callable[[int, Sample, list[Any]], dict[str, Any]]] = {
    "sft": _sft,
    "warm-up": _warmup,
    "alignment": _align,
    "rlvr": _rlvr,
    "llava": _llava,
}
