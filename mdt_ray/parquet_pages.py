"""How much a column of a Parquet file unpacks to, by the headers of its pages.

The file's index says so too, but readers go by the headers, and an index may say anything. Unpacks nothing itself.
Source: the format's parquet.thrift (PageHeader), in Thrift's compact protocol.
"""

import pyarrow as pa
import pyarrow.parquet as pq

VARINTS = {4, 5, 6}
"""Thrift's types i16, i32 and i64."""
FLAGS = {1, 2}
BYTE, DOUBLE, BINARY, STRUCT = 3, 7, 8, 12
DEEPEST = 8
"""Structs in each other, at most: a page's statistics are in the third."""
UNPACKED, PACKED = 2, 3
"""Fields of a PageHeader: bytes of the page, of which its header is none."""


def unpacked_bytes(handle: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> int:
    """Bytes of all pages of a row group's column, unpacked. No batch of n rows that is read from it has more than n times
    that. Raises ValueError for what are no pages."""
    length = chunk.total_compressed_size
    start = min((place for place in (chunk.dictionary_page_offset, chunk.data_page_offset) if place), default=0)
    if min(start, length) < 0 or start + length > handle.size():
        raise ValueError(f"column {chunk.path_in_schema} has {length} bytes in a file of {handle.size()}: damaged")
    if chunk.compression == "UNCOMPRESSED":
        return length
    data, at, total = handle.read_at(length, start), 0, 0
    try:
        while at < len(data):
            fields, at = _struct(data, at)
            if min(fields[UNPACKED], fields[PACKED]) < 0:
                raise ValueError
            total += fields[UNPACKED]
            at += fields[PACKED]
    except (ValueError, LookupError) as error:
        raise ValueError(f"column {chunk.path_in_schema} has no readable pages: damaged") from error
    return total


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, int], int]:
    """Whole numbers of a struct by the number of their field, and where it ends."""
    if depth == DEEPEST:
        raise ValueError
    found, field = {}, 0
    while data[at]:
        step, kind = data[at] >> 4, data[at] & 15
        at += 1
        if step:
            field += step
        else:
            field, at = _number(data, at)
        if kind in VARINTS:
            found[field], at = _number(data, at)
        elif kind == BINARY:
            length, at = _varint(data, at)
            at += length
        elif kind == STRUCT:
            _, at = _struct(data, at, depth + 1)
        elif kind in (BYTE, DOUBLE):
            at += 1 if kind == BYTE else 8
        elif kind not in FLAGS:
            raise ValueError
    return found, at + 1


def _number(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise ValueError
