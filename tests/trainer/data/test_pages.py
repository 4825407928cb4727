"""Row groups whose pages and dictionaries are far larger than memory: the same values, by small pages."""

from __future__ import annotations

import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_fast.data import pages, parquet, row_groups, thrift, unpack, values
from prism_fast.data.cache import Cache
from prism_fast.records import DataError

RNG_SEED = 18
PEAK = """
import sys
from pathlib import Path
from prism_fast.data import row_groups

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
row_groups.cut(Path(sys.argv[1]), Path(sys.argv[2]), ["images", "question"])
print((peak() - before) >> 10)
"""


def table(rows: int = 300) -> pa.Table:
    """Lists that are missing, empty or hold several, values that are missing, empty, equal or longer than a page."""
    rng = random.Random(RNG_SEED)
    seen: list[bytes] = []

    def image() -> dict[str, object] | None:
        content = rng.choice([None, b"", rng.randbytes(rng.randrange(900)), b"ab" * rng.randrange(200), *seen[-1:]])
        seen.append(content or b"")
        return rng.choice([None, *[{"bytes": content, "path": rng.choice([None, "a.png"])}] * 9])

    records = [
        {
            "images": rng.choice([None, [], *[[image() for _ in range(rng.randrange(1, 5))]] * 6]),
            "question": f"How many trees, {'?' * rng.randrange(99)} {i}",
            "number": i,
            "nothing": None,
            "turns": [{"content": [{"text": "x" * rng.randrange(9)} for _ in range(rng.randrange(3))]}],
        }
        for i in range(rows)
    ]
    image_type = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    turns = pa.list_(pa.struct([("content", pa.list_(pa.struct([("text", pa.string())])))]))
    schema = pa.schema(
        [
            ("images", image_type),
            pa.field("question", pa.string(), nullable=False),
            ("number", pa.int64()),
            ("nothing", pa.string()),
            ("turns", turns),
        ]
    )
    return pa.Table.from_pylist(records, schema)


@pytest.fixture
def small(monkeypatch):
    """Limits that every page of a test is over."""
    monkeypatch.setattr(pages, "LARGEST_PAGE", 4)
    monkeypatch.setattr(pages, "PAGE_BYTES", 300)
    monkeypatch.setattr(unpack, "PIECE", 64)
    monkeypatch.setattr(pages, "PIECE", 64)
    monkeypatch.setattr(values, "IN_MEMORY", 100)
    monkeypatch.setattr(row_groups, "PIECE_BYTES", 3000)


def cut(path, columns=None):
    target = path.with_name("cut.parquet")
    row_groups.cut(path, target, columns or pq.read_schema(path).names)
    return target


PLAIN = {"use_dictionary": False}
DELTA = {"images.list.element.bytes": "DELTA_LENGTH_BYTE_ARRAY", "question": "DELTA_BYTE_ARRAY"}
WRITERS = {
    **{codec: {"compression": codec} for codec in ("none", "snappy", "gzip", "brotli", "zstd", "lz4")},
    **{f"{codec}, plain": {"compression": codec, **PLAIN} for codec in ("none", "snappy", "gzip", "zstd", "lz4")},
    "page v2": {"data_page_version": "2.0", "compression": "snappy"},
    "page v2, plain": {"data_page_version": "2.0", "compression": "zstd", **PLAIN},
    "row groups": {"row_group_size": 77},
    "small pages": {"write_batch_size": 20, "data_page_size": 500},
    "the dictionary is full": {"write_batch_size": 20, "dictionary_pagesize_limit": 2000},
    "deltas": {"column_encoding": DELTA, **PLAIN},
    "checksums": {"write_page_checksum": True},
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("options", WRITERS.values(), ids=WRITERS)
def test_the_same_values(tmp_path, monkeypatch, options):
    path, want = tmp_path / "a.parquet", table()
    pq.write_table(want, path, **options)
    remade = []
    split = pages.Column.small_pages
    monkeypatch.setattr(pages.Column, "small_pages", lambda self, held: remade.append(self.name) or split(self, held))
    found = pq.read_table(cut(path))
    found.validate(full=True)
    assert found.equals(want)
    assert found.schema.equals(want.schema)
    assert {"images.list.element.bytes", "question"} <= set(remade)
    assert "number" not in remade
    meta = pq.read_metadata(tmp_path / "cut.parquet")
    assert all(meta.row_group(i).total_byte_size < 12_000 for i in range(meta.num_row_groups))


@pytest.mark.usefixtures("small")
def test_what_is_not_read_here_is_left_to_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path)
    monkeypatch.setattr(pages, "CODECS", ())
    monkeypatch.setattr(pages.Column, "small_pages", None)
    assert pq.read_table(cut(path)).equals(table())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("options", [{}, {"compression": "none"}, {"data_page_version": "2.0"}, PLAIN], ids=str)
def test_a_damaged_page_is_one_line(tmp_path, options):
    path, rng = tmp_path / "a.parquet", random.Random(RNG_SEED)
    pq.write_table(table(60), path, write_page_checksum=True, **options)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for _ in range(60):
        at = rng.randrange(4, footer)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        try:
            found = pq.read_table(cut(path))
        except DataError as error:
            assert "row group 1 cannot be read; copy the file again (" in str(error)
            assert "\n" not in str(error)
            refused += 1
        else:  # in a statistic, or in bits that nothing looks at
            assert found.equals(table(60))
    assert refused > 40


@pytest.mark.parametrize(
    ("options", "equal"), [({}, False), ({"data_page_version": "2.0", **PLAIN}, False), ({}, True)], ids=str
)
def test_memory_does_not_grow_with_a_page(tmp_path, options, equal):
    """64 images of 1 MB in one page, or dictionary; equal ones are stored once and unpacked for every row."""
    path, rng = tmp_path / "a.parquet", random.Random(RNG_SEED)
    content = [rng.randbytes(1 << 20) for _ in range(1 if equal else 64)] * (64 if equal else 1)
    rows = {"images": [[{"bytes": image, "path": None}] for image in content], "question": [f"{i}?" for i in range(64)]}
    pq.write_table(pa.table(rows), path, **options)
    target = tmp_path / "cut.parquet"
    done = subprocess.run([sys.executable, "-c", PEAK, path, target], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60  # MB; the page alone is 64
    assert pq.read_table(target).equals(pa.table(rows))


@pytest.mark.parametrize("options", [{}, {"data_page_version": "2.0"}, {"compression": "none"}], ids=str)
def test_equal_images_are_counted_as_often_as_they_are_unpacked(tmp_path, capsys, options):
    """Else a file of 2 MB would be read as a row group of 40."""
    path, image = tmp_path / "a.parquet", random.Random(RNG_SEED).randbytes(1 << 20)
    one, none = {"bytes": image, "path": None}, {"bytes": None, "path": None}
    rows = {"images": [[one] if i % 50 else [none] for i in range(41)], "question": ["How many?"] * 41}
    pq.write_table(pa.table(rows), path, **options)
    assert path.stat().st_size < 4 << 20
    data = parquet.Parquet(path, Cache(tmp_path / "cache"))
    assert "row groups of up to 40 MiB, 41 rows are cut into pieces" in capsys.readouterr().err
    assert data[40]["images"][0]["bytes"] == image
    small = {**rows, "images": rows["images"][:20], "question": rows["question"][:20]}
    pq.write_table(pa.table(small), path, **options)
    assert len(parquet.Parquet(path, Cache(tmp_path / "cache"))) == 20
    assert not capsys.readouterr().err


def claiming(path, claimed: int, column: int, rows: int, lists: bool = False, dictionary: bool = False):
    """A file of one page that says it has ``claimed`` values, its column ``column`` and its row group ``rows`` rows.
    They are nulls, or all the one value of a dictionary."""
    kind = pa.list_(pa.string()) if lists else pa.string()
    pq.write_table(pa.table({"x": pa.array([["one"]] if lists else ["one"], kind)}), path, compression="none")
    whole = path.read_bytes()
    end = len(whole) - 8
    footer, _ = thrift.read_struct(whole[end - int.from_bytes(whole[end : end + 4], "little") : end])

    def run(level: int) -> bytes:
        data = thrift.varint(claimed << 1) + bytes([level])
        return len(data).to_bytes(4, "little") + data

    i32 = lambda number: (thrift.I32, number)  # noqa: E731
    told = {1: i32(claimed), 2: i32(values.RLE_DICTIONARY if dictionary else 0), 3: i32(3), 4: i32(3)}
    body = (run(1) if lists else b"") + run(1 if dictionary else 0)
    body += b"\1" + thrift.varint(claimed << 1) + b"\0" if dictionary else b""
    pages_of = b"PAR1"
    if dictionary:
        entry = (3).to_bytes(4, "little") + b"one"
        header = {1: i32(2), 2: i32(len(entry)), 3: i32(len(entry)), 7: (thrift.STRUCT, {1: i32(1), 2: i32(0)})}
        pages_of += thrift.write_struct(header) + entry
    at = len(pages_of)
    header = {1: i32(0), 2: i32(len(body)), 3: i32(len(body)), 5: (thrift.STRUCT, told)}
    pages_of += thrift.write_struct(header) + body
    group = footer[4][1][1][0]
    meta = group[1][1][1][0][3][1]
    for field in (8, 11, 12, 13, 15, 16):
        meta.pop(field, None)
    size = (thrift.I64, len(pages_of) - 4)
    meta |= {5: (thrift.I64, column), 6: size, 7: size, 9: (thrift.I64, at)}
    if dictionary:
        meta[11] = (thrift.I64, 4)
    group[3] = footer[3] = (thrift.I64, rows)
    told_all = thrift.write_struct(footer)
    path.write_bytes(pages_of + told_all + len(told_all).to_bytes(4, "little") + b"PAR1")
    return path


MANY = (1 << 31) - 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize(("column", "rows"), [(10, 10), (MANY, 10)])
def test_a_page_that_claims_billions_of_values_is_refused_before_any(tmp_path, monkeypatch, lists, column, rows):
    """A run of levels of any length takes six bytes; each level would be a step."""
    assert pq.read_table(cut(claiming(tmp_path / "a.parquet", 10, 10, 10))).to_pylist() == [{"x": None}] * 10
    monkeypatch.setattr(pages._Made, "add", None)
    monkeypatch.setattr(values, "repeat", None)
    path = claiming(tmp_path / "b.parquet", MANY, column, rows, lists)
    with pytest.raises(DataError, match=r"row group 1 cannot be read; .*: (pages of )?2147483647 va"):
        cut(path)


@pytest.mark.parametrize("count", [10, MANY])
def test_values_are_counted_by_runs(tmp_path, monkeypatch, count):
    path = claiming(tmp_path / "a.parquet", count, count, count, dictionary=True)
    if count == 10:
        assert pq.read_table(path).to_pylist() == [{"x": "one"}] * 10
    monkeypatch.setattr(values, "repeat", None)
    small = pages.SmallPages(path, pq.read_metadata(path))
    assert small.unpacked_bytes(0, 0) == 3 * count
    small.close()


PACKED = {
    "noise": random.Random(RNG_SEED).randbytes(300_000),
    "one byte": b"x",
    "runs": b"ab" * 100_000,
    "words": b" ".join(random.Random(RNG_SEED).choices([b"tree", b"root", b"image", bytes(70), b"?"], k=60_000)),
}


@pytest.mark.parametrize("content", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("codec", unpack._NAMES)
def test_pieces_unpack_to_the_whole(monkeypatch, codec, content):
    monkeypatch.setattr(unpack, "WINDOW", 1 << 16)
    packed = pa.compress(content, unpack._NAMES[codec], asbytes=True)

    def stream(packed: bytes, step: int) -> unpack.Stream:
        pieces = (packed[at : at + step] for at in range(0, len(packed), step))
        return unpack.Stream(unpack.unpacked(pieces, codec, len(content)), len(content))

    for step in (999, len(packed)):
        read = stream(packed, step)
        assert b"".join(read.take(min(700, read.left)) for _ in range(0, len(content), 700)) == content
        read.finish()
    with pytest.raises((OSError, IndexError)):
        stream(packed[:-1], 999).take(len(content))
    with pytest.raises(OSError, match="are told where a page has"):
        stream(packed, 999).take(len(content) + 1)


@pytest.mark.parametrize(
    ("codec", "packed"),
    [
        (unpack.SNAPPY, b"\x05\x00a\x01\x02"),  # back by two of one
        (unpack.SNAPPY, b"\x05\x10abcdefgh"),  # more than it says, and nothing of it is needed
        (unpack.SNAPPY, b"\x06\x10abcde"),  # another length
        (unpack.SNAPPY, b"\x05\xfc\xff\xff\xff\xffabcde"),  # a literal of 4 GB
        (unpack.LZ4_RAW, b"\x10a\x00\x00"),  # back by nothing
        (unpack.LZ4_RAW, b"\x1fa\x01\x00\xff\xff\xff\x01"),  # a copy of more than is left
        (unpack.LZ4_RAW, b"\xf0\xff\xff"),
    ],
)
def test_damaged_blocks(codec, packed):
    with pytest.raises((OSError, IndexError)):
        read = unpack.Stream(unpack.unpacked(iter([packed]), codec, 5), 5)
        read.take(5)
        read.finish()


@pytest.mark.parametrize("width", [1, 2, 7, 8, 13, 20, 32])
def test_numbers_in_groups_and_runs(width):
    rng = random.Random(RNG_SEED)
    groups = [rng.getrandbits(width) for _ in range(8 * 700)]
    bits = sum(number << at * width for at, number in enumerate(groups))
    data = thrift.varint(700 << 1 | 1) + bits.to_bytes(700 * width, "little")
    data += thrift.varint(1000 << 1) + (1).to_bytes((width + 7) // 8, "little")
    want = groups + [1] * 1000
    assert list(values.numbers(data, width, None)) == want
    assert list(values.numbers(data, width, 5605)) == want[:5605]
    with pytest.raises(OSError, match="1 levels are missing"):
        list(values.numbers(data, width, len(want) + 1))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80" * 12, b"\x1c" * 5000, b"\x19\xfc\xff\xff\xff\x0f", b"\x18\xff\xff\xff\xff\x0fabc", b"\x1b\x00\x00"],
    ids=["nothing", "number", "deep", "list", "text", "map"],
)
def test_a_damaged_struct_takes_no_memory(data):
    with pytest.raises((thrift.Fault, IndexError)):
        thrift.read_struct(data)


def test_structs_are_written_as_they_were_read(tmp_path):
    pq.write_table(table(5), tmp_path / "a.parquet", sorting_columns=[pq.SortingColumn(2)])
    whole = (tmp_path / "a.parquet").read_bytes()
    footer = whole[-8 - int.from_bytes(whole[-8:-4], "little") : -8]
    struct, end = thrift.read_struct(footer)
    assert end == len(footer)
    assert thrift.write_struct(struct) == footer
