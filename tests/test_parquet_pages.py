"""What Parquet's pages unpack to, against pyarrow's own index of files that it wrote, and files whose index lies."""

import io
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdt_ray import parquet_pages, tables
from tests.conftest import ROOT

TEXTS = [f"n{i % 7:08d}" * (i % 50) for i in range(5000)]
TABLE = pa.table({"text": TEXTS, "number": np.arange(5000), "share": np.arange(5000) / 7,
                  "none": pa.nulls(5000, pa.string()), "pair": [{"path": text, "bytes": text.encode()} for text in TEXTS]})


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("compact", [True, False])
def test_the_pages_add_up_to_what_a_true_index_says(tmp_path, version, compression, compact):
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE, path, compression=compression, data_page_version=version, use_dictionary=compact,
                   row_group_size=2000, data_page_size=3000, write_page_checksum=True)
    metadata = pq.read_metadata(path)
    for k in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            chunk = metadata.row_group(k).column(i)
            start, data = chunk.dictionary_page_offset or chunk.data_page_offset, path.read_bytes()
            found = parquet_pages.survey(data[start:start + chunk.total_compressed_size])
            # (The index counts headers too, of a few bytes to some hundred with the statistics in them.)
            total = found.repeated + found.rows
            assert 0.5 * chunk.total_uncompressed_size - 100 < total <= chunk.total_uncompressed_size
            assert (found.repeated > 0) == (compact and chunk.path_in_schema != "none")
            assert 0 < found.largest <= found.rows
            assert found.encodings <= (parquet_pages.SAFE if compact else parquet_pages.PLAIN)


def zigzag(value: int, length: int = 0) -> bytes:
    """A varint of Thrift's compact protocol, which any number of zeros may end."""
    value, found = 2 * value, []
    while value or not found or len(found) < length:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found[:-1], found[-1] & 127])


def lie(path, field: bytes, true: int, told: int, last: bool = False) -> None:
    """Change a number of a file's index: the one after the field's first byte."""
    change(path, field + zigzag(true), field + zigzag(told, len(zigzag(true))), last)


def change(path, old: bytes, new: bytes, last: bool = False) -> None:
    """Bytes of a file's index."""
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    at = data.rindex(old, start) if last else data.index(old, start)
    assert len(old) == len(new)
    path.write_bytes(data[:at] + new + data[at + len(old):])


NUMBER = b"\x16"
"""A field of type i64, which comes next after the one before: total_uncompressed_size, num_rows."""


def peak_of(call: str, path) -> tuple[str, float]:
    """What `tables.<call>` raises in a process of its own, and the MiB that pyarrow took at most."""
    code = (f"import sys\nimport pyarrow as pa\nfrom mdt_ray import tables\n"
            f"try:\n    tables.{call}(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n"
            "print(pa.default_memory_pool().max_memory())")
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    *error, peak = done.stdout.splitlines()
    return " ".join(error), int(peak) / 2**20


REFUSED = ("texts of more than 4096 bytes", "unpacks to more than 100 times its size: not read",
           "unpacks to pages of ")


def bomb(path, compact: bool, columns: int = 1):
    """A file of some kilobytes that unpacks to 300 MiB for each column."""
    pq.write_table(pa.table({f"label{k}": ["x" * 2**20] * 300 for k in range(columns)}), path, compression="zstd",
                   use_dictionary=compact, dictionary_pagesize_limit=2**24)
    assert path.stat().st_size < 2**17
    return path


@pytest.mark.parametrize("call", ["read", "read_values"])
@pytest.mark.parametrize("told", [0, 1, None])
@pytest.mark.parametrize("compact", [True, False])
def test_an_index_that_makes_a_table_small_is_not_believed(tmp_path, told, compact, call):
    path = bomb(tmp_path / "bomb.parquet", compact)
    true = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    if told is None:  # nor one that names another column
        change(path, b"\x06label0", b"\x06labeX0", last=True)
        assert pq.read_metadata(path).row_group(0).column(0).path_in_schema == "labeX0"
    else:
        lie(path, NUMBER, true, told)
        assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == told
    error, peak = peak_of(call, path)
    assert any(text in error for text in REFUSED)
    assert peak < 200


@pytest.mark.parametrize("call", ["read", "read_values"])
@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_texts_as_differences_are_refused(tmp_path, version, encoding, call):
    """Three hundred of a megabyte take a megabyte and some, and any number of empty ones a few bytes."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"label": ["x" * 2**20 + f"{i}" for i in range(300)]}), path, compression="zstd",
                   use_dictionary=False, column_encoding={"label": encoding}, data_page_version=version)
    error, peak = peak_of(call, path)
    assert "holds texts as differences from each other: not read; write it in plain encoding" in error
    assert peak < 20


@pytest.mark.parametrize("call", ["read", "read_values"])
def test_columns_share_what_is_unpacked_at_once(tmp_path, call):
    error, peak = peak_of(call, bomb(tmp_path / "bomb.parquet", True, columns=8))
    assert any(text in error for text in REFUSED)
    assert peak < 200


def test_columns_of_nothing_take_memory_too(tmp_path):
    """A thousand of them, and as many rows as there are bytes."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({f"{k}": pa.nulls(200_000, pa.string()) for k in range(500)}), path)
    for call in ("read", "read_values"):
        error, peak = peak_of(call, path)
        assert "unpacks to more than 100 times its size: not read" in error
        assert peak < 400


@pytest.mark.parametrize("column", [pa.nulls(200, pa.binary(2**20)), pa.nulls(200, pa.list_(pa.int64()))])
def test_columns_that_take_memory_without_bytes_are_refused(tmp_path, column):
    pq.write_table(pa.table({"a": column}), tmp_path / "x.parquet")
    for read in (tables.read, tables.read_values):
        with pytest.raises(ValueError, match=r"x.parquet: column a is of type .*; it must be of numbers or of texts"):
            read(str(tmp_path / "x.parquet"))


def test_an_ordinary_column_is_not_read_row_by_row(tmp_path, monkeypatch):
    """A million rows make one row group, of more bytes than are unpacked at once."""
    monkeypatch.setattr(tables, "BATCH_BYTES", 2**20)
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(100_000)]
    table = pa.table({"file": names, "label": np.arange(100_000) % 1000})
    pq.write_table(table, tmp_path / "x.parquet", data_page_size=2**14, dictionary_pagesize_limit=2**14)
    sizes, read = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches",
                        lambda file, rows, **options: sizes.append(rows) or read(file, rows, **options))
    assert tables.read(str(tmp_path / "x.parquet")) == table
    first, rest = sizes  # the first fetches
    assert first == 1
    assert rest > 10


def test_parts_of_more_rows_than_the_file_are_damage(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": range(100)}), path)
    lie(path, NUMBER, 100, 90, last=True)
    metadata = pq.read_metadata(path)
    assert (metadata.num_rows, metadata.row_group(0).num_rows) == (100, 90)
    for read in (tables.read, tables.read_values):
        with pytest.raises(ValueError, match=r"x.parquet: has 100 rows by its index, and 90 in its parts: damaged"):
            read(str(path))


HEADER = b"\x15\x00\x15\x80\x01\x15\x10\x2c\x15\xc8\x01\x15\x00\x15\x06\x15\x06\x00\x00"
"""A page of 64 bytes in eight, as pyarrow writes it: kind, sizes, and a struct with the number of its rows."""


@pytest.mark.parametrize("pages", [
    HEADER + bytes(7),  # ends early
    HEADER + bytes(9),  # something follows
    HEADER.replace(b"\x15\x80\x01", b"\x16\x80\x01", 1) + bytes(8),  # a size of another type, which readers skip
    HEADER.replace(b"\x15\x80\x01", b"\x05\x02\x80\x01", 1) + bytes(8),  # the field before once more
    HEADER.replace(b"\x15\x10", b"\x15\x90\x80\x80\x80\x10", 1) + bytes(8),  # 2^31 more, which wraps around
    HEADER.replace(b"\x15\x00\x15\x06", b"\x15\x8e\x80\x80\x80\x10\x15\x06", 1) + bytes(8),  # an encoding likewise
    HEADER.replace(b"\x15\x10", b"\x15\x0f", 1) + bytes(8),  # negative
    HEADER.replace(b"\x15\x10", b"", 1) + bytes(8),  # missing
    HEADER.replace(b"\x2c", b"\x29", 1) + bytes(8),  # a list
    HEADER[:8] + b"\x1c" * 20 + bytes(20), HEADER[:8] + b"\x28" + b"\xff" * 12, b"\xff" * 30, bytes(30)])
def test_headers_that_readers_may_take_for_others_are_damage(pages):
    two = 2 * (HEADER + bytes(8))
    assert parquet_pages.survey(two) == parquet_pages.Pages(len(two), 0, 128, 64, frozenset({0}))
    with pytest.raises(ValueError, match="no readable pages: damaged"):
        parquet_pages.survey(pages)


def test_a_header_may_give_the_number_of_a_field_in_full():
    full = HEADER.replace(b"\x15\x80\x01", b"\x05\x04\x80\x01", 1) + bytes(8)  # the second, not the next
    assert parquet_pages.survey(full) == parquet_pages.Pages(len(full), 0, 64, 64, frozenset({0}))


def test_damaged_pages_are_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": TEXTS, "b": TEXTS}), path)
    whole, chunk = path.read_bytes(), pq.read_metadata(path).row_group(0).column(1)
    start = chunk.dictionary_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 30 + whole[start + 30:])
    for read in (tables.read, tables.read_values):
        with pytest.raises(ValueError, match=r"x.parquet: its column of .* has no readable pages: damaged"):
            read(str(path))


def test_of_a_fetched_group_nothing_else_is_read(tmp_path):
    """Readers look some bytes further in files of a writer that counted wrongly (PARQUET-816): pages may hide there."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": TEXTS, "b": TEXTS}), path)
    change(path, b"parquet-cpp-arrow version", b"parquet-mr version 1.2.8 ")
    with pytest.raises(ValueError, match=r"x.parquet: its column .* has no readable pages: damaged"):
        tables.read(str(path))


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_come_in_any_form(tmp_path, kind):
    pq.write_table(pa.table({"a": pa.array(["x", None, "y"]).cast(kind)}), tmp_path / "x.parquet")
    assert tables.read_values(str(tmp_path / "x.parquet")) == {"a": ["x", None, "y"]}


def test_columns_of_one_name_are_refused(tmp_path):
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet: has more than one column a"):
        tables.read_values(str(tmp_path / "x.parquet"))


def test_each_column_is_fetched_once(tmp_path):
    """And whole: an object store takes tens of milliseconds for a request."""
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE, path, row_group_size=1000, data_page_size=3000, compression="zstd")
    asked = []

    class Counted(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    with pa.PythonFile(Counted(str(path)), mode="r") as handle:
        file = tables.open_handle(handle)
        asked.clear()
        found = tables.values(file, handle, ["text", "pair.path"])
    assert found == {"text": TEXTS, "pair.path": TEXTS}
    assert len(asked) == 2 * 5


def test_damage_anywhere_is_an_error_that_names_the_file(tmp_path):
    """pyarrow ends the process for some of it, where its index is asked for a column."""
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE.select(["text", "number"]).slice(0, 100), path, row_group_size=30)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    told = 0
    for _ in range(600):
        data = bytearray(whole)
        for at in rng.integers(4, len(data) - 8, 3):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        for read in (tables.read, tables.read_values):
            try:
                read(str(path))
            except ValueError as error:
                assert str(error).startswith(str(path))  # noqa: PT017
                told += 1
    assert told > 300
