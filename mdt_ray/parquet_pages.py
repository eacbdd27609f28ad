"""What a column of a Parquet file unpacks to, by the headers of its pages.

The file's index says so too, but readers go by the headers, and an index may say anything. Unpacks nothing itself.
Source: the format's parquet.thrift (PageHeader).
"""

from dataclasses import dataclass

from mdt_ray import thrift
from mdt_ray.thrift import INT32, STRUCT, Struct

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
    walk, repeated, rows, encodings = thrift.Walk(data), 0, [0], set()
    try:
        while walk.at < len(data):
            fields, found = _header(walk)
            if fields[KIND] == DICTIONARY:
                repeated += fields[UNPACKED]
            else:
                rows.append(fields[UNPACKED])
            encodings |= found
            walk.at += fields[PACKED]
        if walk.at > len(data):
            raise ValueError
    except (ValueError, LookupError) as error:
        raise ValueError("no readable pages: damaged") from error
    return Pages(len(data), repeated, sum(rows), max(rows), frozenset(encodings))


def _header(walk: thrift.Walk) -> tuple[dict[int, int], set[int]]:
    """Whole numbers of the page's header that begins by the number of their field, and the encodings that it names."""
    found, encodings, number = {}, set(), 0
    while place := walk.field(number):
        number, kind = place
        if number > CHECKSUM and kind == STRUCT:
            numbers = walk.struct(Struct(), 1)
            if number in ENCODING:
                encodings.add(numbers[ENCODING[number], INT32])
        elif number <= CHECKSUM and kind == INT32:
            found[number] = walk.value(kind, None, 1)
            if number != CHECKSUM and found[number] < 0:
                raise ValueError
        else:
            raise ValueError
    return found, encodings
