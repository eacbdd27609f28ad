"""What a column of a Parquet file unpacks to, by the headers of its pages.

The file's index says so too, but readers go by the headers, and an index may say anything. Unpacks nothing itself. Headers
are read as strictly as they are written, so that no reader takes them for others.
Source: the format's parquet.thrift (PageHeader), in Thrift's compact protocol.
"""

from dataclasses import dataclass

FLAGS, BYTE, INTEGERS, INT32, DOUBLE, BINARY, STRUCT = {1, 2}, 3, {4, 5, 6}, 5, 7, 8, 12
"""Types of Thrift's compact protocol. (Pages have no lists.)"""
LAST = 64
"""Number that no field reaches."""
DEEPEST = 8
"""Structs in each other, at most: a page's statistics are in the third."""
KIND, UNPACKED, PACKED, CHECKSUM = 1, 2, 3, 4
"""Fields of a PageHeader, of which the first three are in all; structs come after them. Bytes are without the header."""
ENCODING = {5: 2, 7: 2, 8: 4}
"""Where the encoding of values is, in the two forms of data and in dictionaries: the header's field of a struct, and the
field in that."""
DICTIONARY = 2
"""Kind of the page whose values those of others name."""
PLAIN = frozenset({0, 3, 4})
"""Encodings of rows as they are; the latter two tell which of them are missing."""
SAFE = PLAIN | {2, 5, 8, 9}
"""With dictionaries, and those of numbers. Texts as differences (6, 7) may be any number in a few bytes, whatever else is
said of them."""


@dataclass(frozen=True)
class Pages:
    """What a row group's column unpacks to, in bytes."""

    packed: int
    """As they are in the file, with headers."""
    repeated: int
    """Of dictionaries, of which each row may have all."""
    rows: int
    """Of all other pages."""
    largest: int
    """Of these; no row has more."""
    encodings: frozenset[int]


def survey(data: memoryview) -> Pages:
    """Look at all pages of a row group's column. Raises ValueError for what are none."""
    at, repeated, rows, encodings = 0, 0, [0], set()
    try:
        while at < len(data):
            fields, found, at = _header(data, at)
            if fields[KIND] == DICTIONARY:
                repeated += fields[UNPACKED]
            else:
                rows.append(fields[UNPACKED])
            encodings |= found
            at += fields[PACKED]
        if at > len(data):
            raise ValueError
    except (ValueError, LookupError) as error:
        raise ValueError("no readable pages: damaged") from error
    return Pages(len(data), repeated, sum(rows), max(rows), frozenset(encodings))


def _header(data: memoryview, at: int) -> tuple[dict[int, int], set[int], int]:
    """Whole numbers of a page's header by the number of their field, the encodings that it names, and where it ends."""
    found, encodings, field = {}, set(), 0
    while data[at]:
        field, kind, at = _field(data, field, at)
        if field > CHECKSUM and kind == STRUCT:
            numbers, at = _struct(data, at, 1)
            if field in ENCODING:
                encodings.add(numbers[ENCODING[field]])
        elif field <= CHECKSUM and kind == INT32:
            found[field], at = _number(data, kind, at)
            if field != CHECKSUM and found[field] < 0:
                raise ValueError
        else:
            raise ValueError
    return found, encodings, at + 1


def _struct(data: memoryview, at: int, depth: int) -> tuple[dict[int, int], int]:
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


def _field(data: memoryview, before: int, at: int) -> tuple[int, int, int]:
    """Number and type of the field that begins, and where its value does."""
    step, kind = divmod(data[at], 16)
    if not step or before + step > LAST:  # a number in full, which no field here needs, or one that wraps around
        raise ValueError
    return before + step, kind, at + 1


def _number(data: memoryview, kind: int, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    if kind == INT32 and value >= 2**32:  # readers take what fits
        raise ValueError
    return (value >> 1) ^ -(value & 1), at


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError
