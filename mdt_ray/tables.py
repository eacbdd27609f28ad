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

from mdt_ray import parquet_index, parquet_pages, storage

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
MAGIC = b"PAR1"
"""Last in a file."""
TAIL_BYTES, MAX_INDEX_BYTES, MAX_INDEX_MEMORY = 2**16, 2**24, 2**28
"""Of an index: asked for at once; at most; and in memory, at most, where a column of a row group has 1.6 kB."""
MAX_COLUMNS, MAX_PLACES, MAX_NAME_BYTES = 2**12, 2**20, 2**10
"""Of a schema, with its groups; that times the row groups, each of which takes a microsecond for each column of the schema;
and of a name."""
ARROW_SCHEMA, UNREAD = b"ARROW:schema", b"arrow_schema"
"""Key of what Arrow knows of the columns beyond Parquet, and one of the same length that it does not look for."""
FEWER = "write it with larger row groups, and with fewer columns of shorter names"
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
    own = {key: value for key, value in (file.schema_arrow.metadata or {}).items() if key != UNREAD}
    return pa.Table.from_batches(batches, file.schema_arrow).replace_schema_metadata(own)


def read_values(uri: str) -> dict[str, list[Any]]:
    """`values` of all columns. Raises FileNotFoundError, and ValueError naming a file that is none or is refused."""
    def parse(data: bytes) -> dict[str, list[Any]]:
        handle = pa.BufferReader(data)
        file = open_handle(handle)
        return values(file, handle, file.schema_arrow.names)

    return _parsed(uri, parse)


def _parsed(uri: str, parse: Callable[[bytes], T]) -> T:
    def in_memory(data: bytes) -> T:
        try:
            return parse(data)
        except (OSError, LookupError, pa.ArrowException) as error:
            raise ValueError(f"not a readable Parquet file ({error})") from error

    try:
        return storage.parsed(uri, in_memory)
    except ValueError as error:
        raise (Refused if isinstance(error, Refused) else ValueError)(f"{uri}: {error}") from error


def open_handle(handle: pa.NativeFile, **options: Any) -> pq.ParquetFile:
    """An open file as Parquet, with pyarrow's options. Raises Refused for what no table of ours, and no data set, needs: an
    index that takes much memory, and many more rows than bytes; ValueError for an index that is damaged."""
    end = _end(handle)
    try:
        file = pq.ParquetFile(handle, metadata=pq.read_metadata(pa.BufferReader(end)), **options)
        names = file.schema_arrow.names
    except (OSError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None  # it is no outage: nothing was asked of the store
    if again := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"has more than one column {again[0]}")
    groups = [file.metadata.row_group(k) for k in range(file.num_row_groups)]
    if any(group.num_columns != file.metadata.num_columns for group in groups):
        raise ValueError("has row groups of other columns than its schema: damaged")
    count, counts = file.metadata.num_rows, [group.num_rows for group in groups]
    if count > 4 * handle.size():
        raise Refused(f"has {count} rows in {handle.size()} bytes: not read")
    if min(counts, default=0) < 0 or sum(counts) != count:
        raise ValueError(f"has {count} rows by its index, and {sum(counts)} in its parts: damaged")
    return file


def _end(handle: pa.NativeFile) -> bytes:
    """A file's index and what follows it, without what Arrow knows of the columns beyond Parquet: that may take any
    memory too, and name types that Python makes (Ray registers one that unpickles them)."""
    size = handle.size()
    tail = memoryview(handle.read_at(min(size, TAIL_BYTES), max(size - TAIL_BYTES, 0)))
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != MAGIC or length + 8 > size:
        raise ValueError("does not end as a Parquet file does: cut off, or none")
    if length > MAX_INDEX_BYTES:
        raise Refused(f"has an index of {length} bytes: not read; {FEWER}")
    if length + 8 > len(tail):
        whole = memoryview(handle.read_at(length + 8, size - length - 8))
        if whole[-8:] != tail[-8:]:
            raise ValueError("changed while it was read")
        tail = whole
    found = parquet_index.size_of(tail[-8 - length:-8])
    for value, most, what in ((found.memory, MAX_INDEX_MEMORY, "bytes in memory"), (found.columns, MAX_COLUMNS, "columns"),
                              (found.columns * found.row_groups, MAX_PLACES, "columns in all row groups"),
                              (found.longest, MAX_NAME_BYTES, "bytes for a name")):
        if value > most:
            raise Refused(f"has an index with {value} {what}, more than {most}: not read; {FEWER}")
    return bytes(tail[-8 - length:]).replace(ARROW_SCHEMA, UNREAD)


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
                if is_text(column.type) and (pc.max(pc.binary_length(column)).as_py() or 0) > MAX_TEXT_BYTES:
                    raise ValueError(f"{path} has texts of more than {MAX_TEXT_BYTES} bytes")
                found[path] += [same.setdefault(value, value) if isinstance(value, str) else value
                                for value in column.to_pylist()]
    return found


def _require_flat(path: str, kind: pa.DataType) -> None:
    """Raise ValueError for a column whose rows may take memory that the file has no bytes for."""
    if not (is_text(kind) or any(is_kind(kind) for is_kind in NUMBERS)):
        raise ValueError(f"column {path} is of type {kind!s:.200}; it must be of numbers or of texts")


def _batches(file: pq.ParquetFile, handle: pa.NativeFile, k: int, paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Flat columns of a row group, of which some BATCH_BYTES are unpacked at once. Raises as `fetch_group`."""
    if not 0 <= k < file.num_row_groups:
        raise ValueError(f"has {file.num_row_groups} parts, and none is number {k}: damaged")
    if not paths or not file.metadata.row_group(k).num_rows:
        return
    group = fetch_group(file.metadata, handle, k, paths)
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
        except (OSError, LookupError, pa.ArrowException) as error:
            raise ValueError(f"does not unpack ({error}): damaged") from error


class TooLarge(Exception):
    """A column has more bytes in its file than are to be fetched at once."""


def fetch_group(metadata: pq.FileMetaData, handle: pa.NativeFile, k: int, paths: Sequence[str],
                most: int | None = None) -> Group:
    """Fetch columns of a row group of a file that is open at a handle, each by one request, and look at their pages.

    Args:
        most: bytes of a column; TooLarge is raised for one that has more.
    Raises Refused where one row of them might unpack to more than MAX_PAGE_BYTES, by whatever encoding, and ValueError for
    damaged pages; OSError where the store does not answer.
    """
    fetched = _Fetched(handle, most)
    opened = pq.ParquetFile(pa.PythonFile(fetched, mode="r"), metadata=metadata, pre_buffer=False)
    group = Group(opened, k, list(paths), fetched.pages)
    try:
        next(group.batches(1), None)
    except ValueError:
        if fetched.error is not None:  # which pyarrow may have given another form
            raise fetched.error from None
        raise
    return group


class _Fetched(io.RawIOBase):
    """A file from which columns are fetched as pyarrow asks for them: each once, whole, and not before it was looked at."""

    def __init__(self, handle: pa.NativeFile, most: int | None):
        self.handle, self.most, self.at = handle, most, 0
        self.parts: dict[tuple[int, int], memoryview] = {}
        self.pages: list[parquet_pages.Pages] = []
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.handle.size()}[whence]
        return self.at

    def read(self, size: int = -1) -> memoryview:
        place = self.at, size
        if place not in self.parts:
            try:
                self.parts[place] = self._fetch(size)
            except Exception as error:
                self.error = error
                raise
        self.at += size
        return self.parts[place]

    def _fetch(self, size: int) -> memoryview:
        if self.most is not None and size > self.most:
            raise TooLarge
        self.handle.seek(self.at)
        data = memoryview(self.handle.read_buffer(size)).cast("B")
        try:
            pages = parquet_pages.survey(data)
        except ValueError as error:
            raise ValueError(f"its column of {size} bytes from byte {self.at} on has {error}") from error
        if not pages.encodings <= parquet_pages.SAFE:
            raise Refused("holds texts as differences from each other: not read; write it in plain encoding")
        self.pages.append(pages)
        unpacked = sum(column.largest + DICTIONARY_FACTOR * column.repeated for column in self.pages)
        if unpacked > MAX_PAGE_BYTES + sum(column.packed for column in self.pages):
            raise Refused(f"unpacks to pages of {unpacked} bytes: not read")
        return data


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind)
