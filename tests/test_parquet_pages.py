"""What Parquet's pages unpack to, against pyarrow's own index of files that it wrote, and files whose index lies."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdt_ray import parquet_pages, tables

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
    with pa.OSFile(str(path)) as handle:
        metadata = pq.ParquetFile(handle).metadata
        for k in range(metadata.num_row_groups):
            for chunk in (metadata.row_group(k).column(i) for i in range(metadata.num_columns)):
                # (The index counts headers too, of a few bytes to some hundred with the statistics in them.)
                found = parquet_pages.unpacked_bytes(handle, chunk)
                assert 0.5 * chunk.total_uncompressed_size - 100 < found <= chunk.total_uncompressed_size


def zigzag(value: int, length: int = 0) -> bytes:
    """A varint of Thrift's compact protocol, which any number of zeros may end."""
    value, found = 2 * value, []
    while value or not found or len(found) < length:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found[:-1], found[-1] & 127])


def lie(path, field: bytes, true: int, told: int, last: bool = False) -> None:
    """Change a number of a file's index: the one after the field's first byte."""
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    old = field + zigzag(true)
    at = data.rindex(old, start) if last else data.index(old, start)
    path.write_bytes(data[:at] + field + zigzag(told, len(old) - 1) + data[at + len(old):])


TOTAL_UNCOMPRESSED, NUM_ROWS = b"\x16", b"\x16"  # both are i64, and come next after the field before


@pytest.mark.parametrize("told", [0, 1])
@pytest.mark.parametrize("compact", [True, False])
def test_an_index_that_makes_a_table_small_is_not_believed(tmp_path, told, compact):
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"label": ["x" * 2**20] * 300}), path, compression="zstd", use_dictionary=compact,
                   dictionary_pagesize_limit=2**24)
    true = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    lie(path, TOTAL_UNCOMPRESSED, true, told)
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == told
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(ValueError, match=r"label has texts of more than 4096 bytes"):
        tables.read_values(str(path))
    with pytest.raises(tables.Refused, match=r"unpacks to more than 1000 times its size: not read"):
        tables.read(str(path))
    assert pa.default_memory_pool().max_memory() - before < 2**27


def test_parts_of_more_rows_than_the_file_are_damage(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": range(100)}), path)
    lie(path, NUM_ROWS, 100, 90, last=True)
    metadata = pq.read_metadata(path)
    assert (metadata.num_rows, metadata.row_group(0).num_rows) == (100, 90)
    for read in (tables.read, tables.read_values):
        with pytest.raises(ValueError, match=r"x.parquet: has 100 rows by its index, and 90 in its parts: damaged"):
            read(str(path))


def test_what_are_no_pages_is_damage(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": TEXTS}), path, compression="zstd", use_dictionary=False)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    whole = path.read_bytes()
    for start in range(0, 400, 13):  # a header of about that many bytes is first
        for noise in (b"\xff" * 24, bytes(24), b"\x1c" * 24, b"\x19\xf8" * 12, b"\x08" * 24):
            data = bytearray(whole)
            data[chunk.data_page_offset + start:chunk.data_page_offset + start + len(noise)] = noise
            try:
                parquet_pages.unpacked_bytes(pa.BufferReader(bytes(data)), chunk)
            except ValueError as error:
                assert "column a has no readable pages: damaged" in str(error)  # noqa: PT017
    with pytest.raises(ValueError, match=r"column a has \d+ bytes in a file of 100: damaged"):
        parquet_pages.unpacked_bytes(pa.BufferReader(whole[:100]), chunk)
