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
LAST = 64
"""Number that no field reaches."""
DEEPEST = 8
"""Structs in each other, at most: a page's statistics are in the third."""
KIND, UNPACKED, PACKED, CHECKSUM = 1, 2, 3, 4
"""Fields of a PageHeader, of which the first three are in all; structs come after them. Bytes are without the header."""
ENCODING = {5: 2, 8: 4}
"""Where the encoding of values is, in the two forms of data: the header's field of a struct, and the field in that."""
DICTIONARY = 2
"""Kind of the page whose values those of others name."""
PREFIXES = 7
"""Encoding of texts that begin as the one before (DELTA_BYTE_ARRAY)."""
LARGEST = {"UNCOMPRESSED": 1, "SNAPPY": 22, "LZ4": 256, "GZIP": 1033}
"""Bytes that one of a compression's may unpack to. (Of the others it is too many to be of use.)"""


@dataclass(frozen=True)
class Pages:
    """Bytes of a row group's column, unpacked."""

    repeated: int
    """Of pages whose values rows may repeat, each of them."""
    plain: int
    """Of pages with rows."""
    largest: int
    """Of these pages; no row has more."""


def read_pages(handle: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> Pages:
    """Look at all pages of a column in a row group. Raises ValueError for what are none."""
    start, length = chunk.data_page_offset, chunk.total_compressed_size
    if 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    if length < 0 or start < 0 or start + length > handle.size():
        raise ValueError(f"column {chunk.path_in_schema} has {length} bytes in a file of {handle.size()}: damaged")
    data, at, repeated, plain = handle.read_at(length, start), 0, 0, [0]
    try:
        while at < length:
            fields, encoding, at = _header(data, at)
            if fields[KIND] == DICTIONARY or encoding == PREFIXES:
                repeated += fields[UNPACKED]
            if fields[KIND] != DICTIONARY:
                plain.append(fields[UNPACKED])
            at += fields[PACKED]
        if at > length:
            raise ValueError
    except (ValueError, LookupError) as error:
        raise ValueError(f"column {chunk.path_in_schema} has no readable pages: damaged") from error
    return Pages(repeated, sum(plain), max(plain))


def _header(data: bytes, at: int) -> tuple[dict[int, int], int | None, int]:
    """Whole numbers of a page's header by the number of their field, the encoding of its data, and where it ends."""
    found, encoding, field = {}, None, 0
    while data[at]:
        field, kind, at = _field(data, field, at)
        if field > CHECKSUM:
            if kind != STRUCT:
                raise ValueError
            numbers, at = _struct(data, at, 1)
            encoding = numbers.get(ENCODING.get(field), encoding)
        elif kind != INT32:
            raise ValueError
        else:
            found[field], at = _number(data, kind, at)
            if field != CHECKSUM and found[field] < 0:
                raise ValueError
    return found, encoding, at + 1


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, int], int]:
    """Whole numbers of a struct by the number of their field, and where it ends."""
    if depth == DEEPEST:
        raise ValueError
    found, field = {}, 0
    while data[at]:
        field, kind, at = _field(data, field, at)
        if kind in INTEGERS:
            found[field], at = _number(data, kind, at)
        elif kind == BINARY:
            length, at = _varint(data, at)
            if length >= 2**31:
                raise ValueError
            at += length
        elif kind == STRUCT:
            _, at = _struct(data, at, depth + 1)
        elif kind in (BYTE, DOUBLE):
            at += 1 if kind == BYTE else 8
        elif kind not in FLAGS:
            raise ValueError
    return found, at + 1


def _field(data: bytes, before: int, at: int) -> tuple[int, int, int]:
    """Number and type of the field that begins, and where its value does."""
    step, kind = divmod(data[at], 16)
    if not step or before + step > LAST:  # a number in full, which no field here needs, or one that wraps around
        raise ValueError
    return before + step, kind, at + 1


def _number(data: bytes, kind: int, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    if kind == INT32 and value >= 2**32:  # readers take what fits
        raise ValueError
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError
