"""What a column of a Parquet file unpacks to, by the headers of its pages.

The file's index says so too, but readers go by the headers, and an index may say anything. Unpacks nothing itself. Headers
are read as strictly as they are written, so that no reader takes them for others.
Source: the format's parquet.thrift (PageHeader), in Thrift's compact protocol.
"""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

FLAGS, BYTE, INTEGERS, INT32, DOUBLE, BINARY, STRUCT = {1, 2}, 3, {4, 5, 6}, 5, 7, 8, 12
"""Types of Thrift's compact protocol. (Pages have no lists.)"""
DEEPEST = 8
"""Structs in each other, at most: a page's statistics are in the third."""
KIND, UNPACKED, PACKED, CHECKSUM = 1, 2, 3, 4
"""Fields of a PageHeader, of which the first three are in all; structs come after them. Bytes are without the header."""
DICTIONARY = 2
"""Kind of the page whose values those of others name."""
LARGEST = {"UNCOMPRESSED": 1, "SNAPPY": 22, "LZ4": 256, "GZIP": 1033}
"""Bytes that one of a compression's may unpack to. (Of the others it is too many to be of use.)"""


@dataclass(frozen=True)
class Pages:
    """Bytes of a row group's column, unpacked."""

    dictionary: int
    """Of values that rows repeat."""
    plain: int
    """Of all other pages: rows as they are."""
    largest: int
    """Of these pages; no row has more."""


def read_pages(handle: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> Pages:
    """Look at all pages of a column in a row group. Raises ValueError for what are none."""
    start, length = chunk.data_page_offset, chunk.total_compressed_size
    if 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    if length < 0 or start < 0 or start + length > handle.size():
        raise ValueError(f"column {chunk.path_in_schema} has {length} bytes in a file of {handle.size()}: damaged")
    data, at = handle.read_at(length, start), 0
    sizes: dict[bool, list[int]] = {True: [0], False: [0]}
    try:
        while at < length:
            fields, at = _header(data, at)
            sizes[fields[KIND] == DICTIONARY].append(fields[UNPACKED])
            at += fields[PACKED]
        if at > length:
            raise ValueError
    except (ValueError, LookupError) as error:
        raise ValueError(f"column {chunk.path_in_schema} has no readable pages: damaged") from error
    return Pages(sum(sizes[True]), sum(sizes[False]), max(sizes[False]))


def _header(data: bytes, at: int) -> tuple[dict[int, int], int]:
    """Whole numbers of a page's header by the number of their field, and where it ends."""
    found, field = {}, 0
    while data[at]:
        field, kind, at = _field(data, field, at)
        if field > CHECKSUM:
            at = _skip(data, kind, at, 1)
        elif kind != INT32:
            raise ValueError
        else:
            value, at = _varint(data, at)
            found[field] = (value >> 1) ^ -(value & 1)
            if field != CHECKSUM and not 0 <= found[field] < 2**31:
                raise ValueError
    return found, at + 1


def _field(data: bytes, before: int, at: int) -> tuple[int, int, int]:
    """Number and type of the field that begins, and where its value does."""
    step, kind = divmod(data[at], 16)
    if not step:  # a number in full, as no field here needs
        raise ValueError
    return before + step, kind, at + 1


def _skip(data: bytes, kind: int, at: int, depth: int) -> int:
    if kind in FLAGS:
        return at
    if kind in INTEGERS:
        return _varint(data, at)[1]
    if kind == BINARY:
        length, at = _varint(data, at)
        if length >= 2**31:
            raise ValueError
        return at + length
    if kind in (BYTE, DOUBLE):
        return at + (1 if kind == BYTE else 8)
    if kind != STRUCT or depth == DEEPEST:
        raise ValueError
    field = 0
    while data[at]:
        field, kind, at = _field(data, field, at)
        at = _skip(data, kind, at, depth + 1)
    return at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError
