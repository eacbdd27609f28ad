"""Tables in Parquet: ours, written whole; and those of others, opened with care: they may hold what runs code, and a
kilobyte may unpack to gigabytes.

Not a reader of pictures, nor of latents.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
"""Unpacked at once, at most, however a file's pages are made: one row may be more."""
MAX_UNPACKED = 1000
"""Bytes of a table for each of its file, at most."""
OLD_WRITERS = re.compile(r"parquet-mr version (0|1\.[01]\.|1\.2\.[0-8]\b)")
"""Of 2013. What readers do about them (PARQUET-816) would let pages hide."""
PLAIN = {"PLAIN", "RLE", "BIT_PACKED"}
"""Encodings of values as they are; the latter two tell which of them are missing."""


class Refused(ValueError):
    """A table that could do harm is not read."""


def write(uri: str, table: pa.Table, **options: Any) -> None:
    """Create or replace a Parquet file, whole."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def read(uri: str) -> pa.Table:
    """A whole Parquet file. Raises FileNotFoundError, and ValueError as `open_file` and for one that unpacks to too much."""
    def parse(data: bytes) -> pa.Table:
        handle = pa.BufferReader(data)
        file = open_handle(handle)
        return read_groups(file, handle, range(file.num_row_groups))

    return _parsed(uri, parse)


def read_groups(file: pq.ParquetFile, handle: pa.NativeFile, groups: Iterable[int]) -> pa.Table:
    """Row groups of a file that is open at a handle. Raises Refused where they unpack to more than MAX_UNPACKED times its
    size, and ValueError for columns that no table of ours has, and damaged pages."""
    for field in file.schema_arrow:
        _require_flat(field.name, field.type)
    most, batches = BATCH_BYTES + MAX_UNPACKED * handle.size(), []
    for k in groups:
        for batch in _batches(file, handle, k, file.schema_arrow.names):
            most -= batch.nbytes
            if most < 0:
                raise Refused(f"unpacks to more than {MAX_UNPACKED} times its size: not read")
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
    if names := [field.name for field in file.schema_arrow if _makes_objects(field.type)]:
        raise Refused(f"its columns {', '.join(names)} hold Python objects, which could run code: not read")
    count, counts = file.metadata.num_rows, [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
    if count > 4 * handle.size():
        raise Refused(f"has {count} rows in {handle.size()} bytes: not read")
    if OLD_WRITERS.match(file.metadata.created_by or ""):
        raise Refused(f"was written by {file.metadata.created_by}, whose indices are wrong: not read; write it again")
    if min(counts, default=0) < 0 or sum(counts) != count:
        raise ValueError(f"has {count} rows by its index, and {sum(counts)} in its parts: damaged")
    return file


def refuse_packed(metadata: pq.FileMetaData) -> None:
    """Raise Refused for a table that its file does not hold as it is: it might unpack to any size."""
    for k in range(metadata.num_row_groups):
        for column in (metadata.row_group(k).column(i) for i in range(metadata.num_columns)):
            if column.compression != "UNCOMPRESSED" or column.has_dictionary_page or not PLAIN.issuperset(column.encodings):
                raise Refused(f"its column {column.path_in_schema} is packed: not read")


def _makes_objects(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _makes_objects(kind.value_type)
    return isinstance(kind, pa.ExtensionType) or any(_makes_objects(kind.field(i).type) for i in range(kind.num_fields))


def values(file: pq.ParquetFile, handle: pa.NativeFile, paths: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a file that is open at a handle, also of a struct (`image.path`), as Python's values by their path; equal
    texts are one object.

    Raises ValueError for a column of another type, for longer texts, and for damaged pages.
    """
    schema = file.schema_arrow
    places = {path: [path] if path in schema.names else path.split(".") for path in paths}
    for path, (first, *rest) in places.items():
        kind = schema.field(first).type.field(*rest).type if rest else schema.field(first).type
        _require_flat(path, kind)
    found: dict[str, list[Any]] = {path: [] for path in paths}
    same: dict[str, str] = {}
    for k in range(file.num_row_groups):
        for batch in _batches(file, handle, k, paths):
            for path, (first, *rest) in places.items():
                column = pc.struct_field(batch[first], rest) if rest else batch[first]
                if _is_text(column.type) and (pc.max(pc.binary_length(column)).as_py() or 0) > MAX_TEXT_BYTES:
                    raise ValueError(f"{path} has texts of more than {MAX_TEXT_BYTES} bytes")
                found[path] += [same.setdefault(value, value) if isinstance(value, str) else value
                                for value in column.to_pylist()]
    return found


def _require_flat(path: str, kind: pa.DataType) -> None:
    """Raise ValueError for a column whose rows may take memory that the file has no bytes for."""
    if not (_is_text(kind) or any(is_kind(kind) for is_kind in NUMBERS)):
        raise ValueError(f"column {path} is of type {kind}; it must be of numbers or of texts")


def _batches(file: pq.ParquetFile, handle: pa.NativeFile, k: int, paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Flat columns of a row group, of which some BATCH_BYTES are unpacked at once, or one row. Raises ValueError for texts
    that are too long, before they are, where that is plain from their pages."""
    group = file.metadata.row_group(k)
    chunks = [group.column(i) for i in range(group.num_columns) if file.schema.column(i).path in paths]
    most, rows = group.num_rows * MAX_TEXT_BYTES + BATCH_BYTES, max(group.num_rows, 1)
    texts = f"{' or '.join(paths)} has texts of more than {MAX_TEXT_BYTES} bytes"
    if len(chunks) != len(set(paths)):
        raise ValueError(f"its index names {len(chunks)} of the columns {', '.join(paths)} once: damaged")
    if any(chunk.total_compressed_size > most for chunk in chunks):
        raise ValueError(texts)
    bounds = [parquet_pages.LARGEST.get(chunk.compression, most) * max(chunk.total_compressed_size, 0) for chunk in chunks]
    if sum(bounds) * rows > BATCH_BYTES:
        pages = [parquet_pages.read_pages(handle, chunk) for chunk in chunks]
        if max(page.plain for page in pages) > most:
            raise ValueError(texts)
        unit = sum(page.repeated for page in pages)
        if sum(page.plain for page in pages) > BATCH_BYTES:
            unit += sum(page.largest for page in pages)
        rows = max(BATCH_BYTES // unit, 1) if unit else rows
    yield from file.iter_batches(rows, row_groups=[k], columns=list(paths))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
