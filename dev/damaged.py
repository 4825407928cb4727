"""Data files of the published formats, sound and damaged: as JSON, parquet and saved data sets."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dev.fuzzing import damaged, leaves

PARTS = {"caption": "<caption>A cat.</caption>", "cot": "<think>3 + 4 = 7</think><answer>7</answer>"}
RESPONSE = PARTS["caption"] + PARTS["cot"]
PICTURES = ("a.png", "b.jpg")


def picture(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(buffer, name[2:].upper().replace("JPG", "JPEG"))
    return buffer.getvalue()


def _gold(number: int) -> dict[str, Any]:
    return {
        "data_source": "chart",
        "reward_model": {"style": "rule", "ground_truth": str(number), "equivalent_answers": [f"{number}.0", "é"]},
        "extra_info": {"index": number, "question_type": "count"},
    }


def records(kind: str, embedded: bool) -> list[dict[str, Any]]:
    """Six of a format, with images as bytes or as paths."""
    made = []
    for number in range(6):
        image: Any = PICTURES[number % 2]
        image = {"bytes": picture(image), "path": None} if embedded else image
        asked = [{"role": "user", "content": f"<image>How many, 漢 {number}?"}]
        if kind in ("sft", "llava"):
            turns = [*asked, {"role": "assistant", "content": RESPONSE}]
            if number % 2:
                turns = [{"role": "system", "content": "Be short."}, *turns]
            record: dict[str, Any] = {"messages": turns, "images": [image]}
            if kind == "llava":
                names = {"user": "human", "assistant": "gpt", "system": "system"}
                turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
                record = {"id": str(number), "image": image, "conversations": turns}
        else:
            record = {"prompt": asked, "images": [image]}
            if kind == "warm-up" and not embedded:
                record = {"question": f"How many, {number}?", "image": image}
            if kind == "warm-up":
                record |= {f"{voice}_{part}": text for voice in ("teacher", "student") for part, text in PARTS.items()}
            else:
                record |= _gold(number)
            if kind == "alignment":
                record["teacher_response"] = RESPONSE
        made.append(record)
    return made


# ---- JSON

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 7, 10**9, 2**70, -(2**40), 10**400, 0.5, 1e300, float("nan"), float("-inf")),
    *(
        "",
        " ",
        "x",
        "../../x",
        "a.png",
        "/etc/passwd",
        "<image>",
        "<image>" * 3,
        "nan",
        "\0",
        "\u200b",
        "é漢",
        "x" * 70_000,
    ),
    *("<|im_end|>", "<caption>", RESPONSE, RESPONSE * 2, "[1, 2]", "[" * 3000, '[{"role": "user", "content": "x"}]'),
    *("(" * 300 + "1" + ")" * 300, "data:image/png;base64,AAAA", "https://x/y.png", "a\n\x1b[31mb", "b'<image>'"),
    *([], {}, [1, 2], [0, 0, 0], {"a": 1}, [[]], [None], {"bytes": None, "path": None}, {"bytes": "x", "path": 3}),
    *({"bytes": [1, 2], "path": ["a.png"]}, {"type": "image"}, [{"type": "text", "text": "x"}, {"type": "image"}]),
    *({"role": "user", "content": "x"}, {"from": "human", "value": "x"}, [{"role": "tool", "content": [[]]}]),
)
KEYS = (
    "messages",
    "prompt",
    "image",
    "images",
    "system",
    "solution",
    "video",
    "a\n\x1b[31mb",
    "x" * 9999,
    "",
    "answer",
)
KEYS += ("teacher_caption", "student_response", "conversations", "reward_model", "ground_truth", "bytes", "role")


def depth(rng: random.Random) -> int:
    """Of lists in objects: often what a parser of JSON just takes."""
    return rng.choice((5, 100, 300, 800, 3000, 200_000, *(rng.randrange(900, 1000) for _ in range(6))))


def nested(depth: int) -> str:
    return '{"a":[' * (depth // 2) + '"x"' + "]}" * (depth // 2)


TEXTS = (  # what JSON's own writer would not write, in place of a value
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "9" * 5000,
        "1" + "0" * 4000,
        "-0",
        "0x10",
        "1.0e-400",
        "tru",
        "'x'",
        "",
    ),
    *('"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\x01"', '{"a":1,"a":2}', '{"role":"user","role":"x"}', "[1,,2]"),
    *('"' + "\\" * 7 + '"', '"x', "]", "}", "[", "{", ",", ":", "/* x */ 1", "[1,]"),
)
BYTES = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", b"\r", b"\n", b"\x1a", b"\xef\xbb\xbf", b"\xfe\xff", b"\xe2\x80\xa8")


def value(rng: random.Random) -> Any:
    """One of VALUES, as its own: what is made of it is another case's no more."""
    return copy.deepcopy(rng.choice(VALUES))


def edited(tree: Any, rng: random.Random) -> None:
    """Changes some places of a tree of JSON: another value, a key gone, renamed or added."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        holder, key = rng.choice(leaves(tree))
        way = rng.randrange(6)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = holder.pop(key)
        elif way == 2 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = value(rng)
        elif way == 3 and isinstance(holder, list):
            holder.insert(key, rng.choice((holder[key], value(rng))))
        else:
            holder[key] = value(rng)
        if not tree or not leaves(tree):
            tree[:] = [value(rng)]


_MARK = '"a place that is looked for"'


def json_file(base: Sequence[dict[str, Any]], listed: bool, rng: random.Random) -> bytes:
    """A JSON list or JSON lines of the records, damaged."""
    held = json.loads(json.dumps(base))
    how = rng.choice(("tree", "tree", "text", "bytes", "both", "lines"))
    if how in ("tree", "both"):
        edited(held, rng)
    if how == "text":
        holder, key = rng.choice(leaves(held))
        holder[key] = json.loads(_MARK)
    layout = rng.choice((None, None, 1)) if listed else None
    rows = [json.dumps(record, ensure_ascii=rng.random() < 0.5, indent=layout) for record in held]
    if how == "lines":
        for _ in range(rng.choice((1, 2, 4))):
            rows.insert(rng.randrange(len(rows) + 1), rng.choice(("", " ", "\t", "[]", "5", "null", *rows, *TEXTS)))
    text = "[" + ",\n".join(rows) + "]\n" if listed else "".join(row + "\n" for row in rows)
    if how == "text":
        text = text.replace(_MARK, rng.choice((*TEXTS, nested(depth(rng)))))
    data = text.encode("utf-8", "surrogatepass")
    if how in ("bytes", "both"):
        data = damaged([data], rng)
    if how == "lines":
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(BYTES) + data[at:]
    return data


# ---- parquet and Arrow


def _odd_columns(rows: int) -> dict[str, pa.Array]:
    """Columns of types that no format has, and of values that Python has not."""
    text = ["x"] * rows
    broken = pa.Array.from_buffers(
        pa.string(),
        rows,
        [None, pa.py_buffer(np.arange(rows + 1, dtype=np.int32).tobytes()), pa.py_buffer(b"\xff" * rows)],
    )
    return {
        "int": pa.array([2**62] * rows),
        "double": pa.array([float("nan")] * rows),
        "half": pa.array(np.ones(rows, np.float16)),
        "null": pa.nulls(rows),
        "text": pa.array(text),
        "large": pa.array(text, pa.large_string()),
        "broken": broken,
        "coded": pa.array(text).dictionary_encode(),
        "coded broken": broken.dictionary_encode(),
        "bytes": pa.array([b"\xff"] * rows),
        "fixed": pa.array([b"abcd"] * rows, pa.binary(4)),
        "decimal": pa.array([Decimal("1.50")] * rows, pa.decimal128(38, 2)),
        "year 10000": pa.array([253402300800] * rows, pa.timestamp("s")),
        "nowhere": pa.array([0] * rows, pa.timestamp("us", "Mars/Olympus")),
        "long ago": pa.array([-(2**60)] * rows, pa.timestamp("ns")),
        "time": pa.array([86_399_999_999_999] * rows, pa.time64("ns")),
        "duration": pa.array([2**62] * rows, pa.duration("s")),
        "map": pa.array([[("a", 1), ("a", 2)]] * rows, pa.map_(pa.string(), pa.int64())),
        "list": pa.array([[["x", None]]] * rows),
        "struct": pa.array([{"bytes": b"", "path": "a.png"}] * rows),
        "same names": pa.StructArray.from_arrays([pa.array(text), pa.array(text)], names=["a", "a"]),
        "no fields": pa.StructArray.from_arrays([pa.array(text)], names=[""]),
    }


def table(base: Sequence[dict[str, Any]], rng: random.Random, *, whole: bool) -> pa.Table:
    """The records as a table; not ``whole``: with a column of another type, gone, twice or renamed, or without rows."""
    made = pa.Table.from_pylist([base[i % len(base)] for i in range(rng.choice((6, 6, 6, 24, 60)))])
    if whole:
        return made
    names, way = made.column_names, rng.randrange(6)
    if way == 0:
        return made.slice(0, 0)
    name = rng.choice(names)
    at = names.index(name)
    if way == 1:
        return made.remove_column(at)
    if way == 2:
        return made.rename_columns([rng.choice((*KEYS, *names)) if i == at else old for i, old in enumerate(names)])
    odd = _odd_columns(made.num_rows)
    column = odd[rng.choice(sorted(odd))]
    if way == 3:
        return made.append_column(rng.choice((*KEYS, *names)), column)
    if rng.random() < 0.3:
        column = pa.nulls(made.num_rows, made.schema.field(at).type)
    return made.set_column(at, name, column)


def parquet_file(base: Sequence[dict[str, Any]], rng: random.Random) -> tuple[bytes, bool]:
    """(a parquet file of the records, whether bytes of it are damaged); else its table is odd."""
    bytes_too = rng.random() < 0.7
    buffer = io.BytesIO()
    pq.write_table(
        table(base, rng, whole=bytes_too),
        buffer,
        row_group_size=rng.choice((1, 4, 1000)),
        compression=rng.choice(("snappy", "zstd", "gzip", "none", "lz4", "brotli")),
        use_dictionary=rng.random() < 0.5,
        write_statistics=rng.random() < 0.5,
        data_page_version=rng.choice(("1.0", "2.0")),
        data_page_size=rng.choice((100, 1 << 20)),
        write_page_checksum=rng.random() < 0.3,
        write_page_index=rng.random() < 0.2,
        store_schema=rng.random() < 0.8,
    )
    data = buffer.getvalue()
    return (damaged([data], rng, from_end=0.5), True) if bytes_too else (data, False)


def arrow_stream(base: Sequence[dict[str, Any]], rng: random.Random, *, whole: bool = False) -> bytes:
    """As the library datasets writes it; ``whole``: undamaged."""
    made = table(base, rng, whole=whole or rng.random() < 0.7)
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, made.schema) as stream:
        stream.write_table(made, max_chunksize=rng.choice((2, 4, 1000)))
    return buffer.getvalue()
