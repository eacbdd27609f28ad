"""Tables in Parquet: ours, written whole; and those of others, opened with care: they may hold what runs code, and a
kilobyte may unpack to gigabytes.

Not a reader of pictures, nor of latents.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mdt_ray import parquet_pages, storage

T = TypeVar("T")
MAX_TEXT_BYTES = 4096
"""Of a label or a path."""
NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
BATCH_BYTES = 2**26
"""Unpacked at once, at most, however a file's pages are made. (One row may be more.)"""
MAX_PAGE_BYTES = 2**28
"""Of the largest page and the dictionary of all columns that are read together, beyond what they have in the file. Writers'
own are of about 2^20 each."""
DICTIONARY_FACTOR = 5
"""Memory for each byte of a dictionary: a text of one byte has 4 of length, and is looked up by 16."""
ROW_BYTES = 16
"""Of a value in memory, also where a column holds nothing."""
MAX_UNPACKED = 100
"""Bytes of a table for each of its file, beyond BATCH_BYTES, at most."""
TOO_MUCH = f"unpacks to more than {MAX_UNPACKED} times its size: not read"
VALUE_BYTES = 40
"""Of a value in a list of Python."""


class Refused(ValueError):
    """A table that could do harm is not read."""


def write(uri: str, table: pa.Table, **options: Any) -> None:
    """Create or replace a Parquet file, whole."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def read(uri: str) -> pa.Table:
    """A whole Parquet file. Raises FileNotFoundError, and ValueError as `read_groups`, naming it."""
    def parse(data: bytes) -> pa.Table:
        handle = pa.BufferReader(data)
        file = open_handle(handle)
        return read_groups(file, handle, range(file.num_row_groups))

    return _parsed(uri, parse)


def read_groups(file: pq.ParquetFile, handle: pa.NativeFile, groups: Iterable[int]) -> pa.Table:
    """Row groups of a file that is open at a handle. Raises Refused where they unpack to more than MAX_UNPACKED times its
    size, or as `fetch_group`, and ValueError for columns that no table of ours has."""
    for field in file.schema_arrow:
        _require_flat(field.name, field.type)
    most, batches = BATCH_BYTES + MAX_UNPACKED * handle.size(), []
    for k in groups:
        for batch in _batches(file, handle, k, file.schema_arrow.names):
            most -= batch.nbytes
            if most < 0:
                raise Refused(TOO_MUCH)
            batches.append(batch)
    return pa.Table.from_batches(batches, file.schema_arrow)


def read_values(uri: str) -> dict[str, list[Any]]:
    """`values` of all columns. Raises FileNotFoundError, and ValueError naming a file that is none or is refused."""
    def parse(data: bytes) -> dict[str, list[Any]]:
        handle = pa.BufferReader(data)
        file = open_handle(handle)
        return values(file, handle, file.schema_arrow.names)

    return _parsed(uri, parse)


def _parsed(uri: str, parse: Callable[[bytes], T]) -> T:
    try:
        return storage.parsed(uri, parse)
    except ValueError as error:
        raise (Refused if isinstance(error, Refused) else ValueError)(f"{uri}: {error}") from error


def open_handle(handle: pa.NativeFile, **options: Any) -> pq.ParquetFile:
    """An open file as Parquet, with pyarrow's options. Raises Refused for what no table of ours, and no data set, needs:
    columns whose values Python makes (Ray registers a type that unpickles them), and many more rows than bytes; ValueError
    for an index that does not add up."""
    file = pq.ParquetFile(handle, **options)
    if again := [name for name, count in Counter(file.schema_arrow.names).items() if count > 1]:
        raise ValueError(f"has more than one column {', '.join(again)}")
    if names := [field.name for field in file.schema_arrow if _makes_objects(field.type)]:
        raise Refused(f"its columns {', '.join(names)} hold Python objects, which could run code: not read")
    count, counts = file.metadata.num_rows, [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
    if count > 4 * handle.size():
        raise Refused(f"has {count} rows in {handle.size()} bytes: not read")
    if min(counts, default=0) < 0 or sum(counts) != count:
        raise ValueError(f"has {count} rows by its index, and {sum(counts)} in its parts: damaged")
    return file


def _makes_objects(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _makes_objects(kind.value_type)
    return isinstance(kind, pa.ExtensionType) or any(_makes_objects(kind.field(i).type) for i in range(kind.num_fields))


def values(file: pq.ParquetFile, handle: pa.NativeFile, paths: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a file that is open at a handle, also of a struct (`image.path`), as Python's values by their path; equal
    texts are one object.

    Raises ValueError for a column of another type and for longer texts, and as `read_groups`.
    """
    schema = file.schema_arrow
    places = {path: [path] if path in schema.names else path.split(".") for path in paths}
    for path, (first, *rest) in places.items():
        kind = schema.field(first).type.field(*rest).type if rest else schema.field(first).type
        _require_flat(path, kind)
    found: dict[str, list[Any]] = {path: [] for path in paths}
    most = MAX_PAGE_BYTES + MAX_UNPACKED * handle.size()
    same: dict[str, str] = {}
    for k in range(file.num_row_groups):
        for batch in _batches(file, handle, k, paths):
            most -= batch.nbytes + VALUE_BYTES * batch.num_rows * len(paths)
            if most < 0:
                raise Refused(TOO_MUCH)
            for path, (first, *rest) in places.items():
                column = pc.struct_field(batch[first], rest) if rest else batch[first]
                column = column.cast(_plain(column.type))
                if _is_text(column.type) and (pc.max(pc.binary_length(column)).as_py() or 0) > MAX_TEXT_BYTES:
                    raise ValueError(f"{path} has texts of more than {MAX_TEXT_BYTES} bytes")
                found[path] += [same.setdefault(value, value) if isinstance(value, str) else value
                                for value in column.to_pylist()]
    return found


def _require_flat(path: str, kind: pa.DataType) -> None:
    """Raise ValueError for a column whose rows may take memory that the file has no bytes for."""
    kind = _plain(kind)
    if not (_is_text(kind) or any(is_kind(kind) for is_kind in NUMBERS)):
        raise ValueError(f"column {path} is of type {kind}; it must be of numbers or of texts")


def _batches(file: pq.ParquetFile, handle: pa.NativeFile, k: int, paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Flat columns of a row group, of which some BATCH_BYTES are unpacked at once. Raises as `fetch_group`."""
    if not file.metadata.row_group(k).num_rows:
        return
    group = fetch_group(file, handle, k, paths)
    unit = sum(column.repeated for column in group.pages) + ROW_BYTES * len(paths)
    if sum(column.rows for column in group.pages) > BATCH_BYTES:
        unit += sum(column.largest for column in group.pages)
    yield from group.batches(max(BATCH_BYTES // unit, 1))


@dataclass(frozen=True)
class Group:
    """Columns of a row group as fetched, still packed."""

    file: pq.ParquetFile
    number: int
    paths: list[str]
    pages: list[parquet_pages.Pages]

    def batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        """So many rows each, but the last. Raises ValueError where they do not unpack."""
        try:
            yield from self.file.iter_batches(rows, row_groups=[self.number], columns=self.paths, use_threads=False)
        except pa.ArrowException as error:
            raise ValueError(str(error)) from error


def fetch_group(file: pq.ParquetFile, handle: pa.NativeFile, k: int, paths: Sequence[str]) -> Group:
    """Fetch columns of a row group of a file that is open at a handle, each by one request, and look at their pages.

    Raises Refused where one row of them might unpack to more than MAX_PAGE_BYTES, by whatever encoding, and ValueError for
    damaged pages.
    """
    metadata, spans, pages = file.metadata, [], []
    for i in range(metadata.num_columns):
        path = file.schema.column(i).path
        if path in paths:
            start, length = _place_of(metadata.row_group(k).column(i), handle.size())
            handle.seek(start)
            data = memoryview(handle.read_buffer(length)).cast("B")
            spans.append((start, data))
            try:
                pages.append(parquet_pages.survey(data))
            except ValueError as error:
                raise ValueError(f"column {path} has {error}") from error
            if not pages[-1].encodings <= parquet_pages.SAFE:
                raise Refused(f"its column {path} is of differences between texts: not read; write it in plain encoding")
    unpacked = sum(column.largest + DICTIONARY_FACTOR * column.repeated for column in pages)
    if unpacked > MAX_PAGE_BYTES + sum(len(data) for _, data in spans):
        raise Refused(f"its columns {', '.join(paths)} unpack to pages of {unpacked} bytes: not read")
    fetched = pa.PythonFile(_Spans(handle.size(), spans), mode="r")
    return Group(pq.ParquetFile(fetched, metadata=metadata, pre_buffer=False), k, list(paths), pages)


def _place_of(chunk: pq.ColumnChunkMetaData, file_bytes: int) -> tuple[int, int]:
    """First byte and length of a row group's column."""
    start, length = chunk.data_page_offset, chunk.total_compressed_size
    if 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    if length < 0 or start < 0 or start + length > file_bytes:
        raise ValueError(f"column {chunk.path_in_schema} has {length} bytes in a file of {file_bytes}: damaged")
    return start, length


class _Spans(io.RawIOBase):
    """A file of which parts were fetched, and nothing else is."""

    def __init__(self, num_bytes: int, parts: list[tuple[int, memoryview]]):
        self.num_bytes, self.parts, self.at = num_bytes, parts, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.num_bytes}[whence]
        return self.at

    def read(self, size: int = -1) -> memoryview:
        for start, data in self.parts:
            if start <= self.at and self.at + size <= start + len(data):
                found = data[self.at - start:self.at - start + size]
                self.at += size
                return found
        raise ValueError(f"bytes {self.at}..{self.at + size} are of no column that was asked for: damaged")


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of values without the form that memory holds them in."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if kind == pa.string_view() else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
