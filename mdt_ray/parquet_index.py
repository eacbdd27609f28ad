"""What a reader takes to open a Parquet file, by the file's index.

An index of a megabyte may take gigabytes: each column gets the names of all groups that it lies in, and what is left out
of a struct takes memory as well. Each row group that is read takes time for all of the schema. Looks at nothing else.
Source: the format's parquet.thrift (FileMetaData), and pyarrow as measured.
"""

from dataclasses import dataclass

from mdt_ray import thrift
from mdt_ray.thrift import BINARY, INT32, INT64, LIST, STRUCT, List, Struct

PAIRS, TEXTS, NUMBERS = List(STRUCT, 256), List(BINARY, 32), List(INT64, 8)
COLUMN = Struct({2: List(INT32, 4), 3: TEXTS, 8: PAIRS, 13: List(STRUCT, 16), 16: Struct({2: NUMBERS, 3: NUMBERS}),
                 17: Struct({2: List(INT32, 4)})})
"""Of a row group: encodings, path, notes, statistics of encodings, of sizes and of places."""
COLUMNS = List(STRUCT, 1536, Struct({3: COLUMN, 8: Struct({2: Struct({1: TEXTS})})}))
ROW_GROUPS = List(STRUCT, 256, Struct({1: COLUMNS, 4: List(STRUCT, 16)}))
SCHEMA = List(STRUCT, 1024)
FILE = Struct({2: SCHEMA, 4: ROW_GROUPS, 5: PAIRS, 7: List(STRUCT, 64)})
"""All lists that readers know, and memory for each value of them."""
NAME, CHILDREN = (4, BINARY), (5, INT32)
"""Of a column or a group in the schema."""
NAME_BYTES, LETTER_BYTES = 64, 16
"""Memory for each name in a column's or a group's whole one."""


@dataclass(frozen=True)
class Size:
    """Of an index."""

    columns: int
    """Of the schema, with their groups."""
    row_groups: int
    longest: int
    """Bytes of the longest name of these columns."""
    memory: int
    """Bytes that pyarrow takes for it, to a factor of five."""


def size_of(index: memoryview | bytes) -> Size:
    """Raises ValueError for what is no index."""
    walk, names, taken, row_groups, number = thrift.Walk(index), [], 0, 0, 0
    try:
        while place := walk.field(number):
            number, kind = place
            if place == (2, LIST):
                names, taken = _names(walk)
            elif place == (4, LIST):
                row_groups = walk.value(kind, ROW_GROUPS, 1)
            else:
                walk.value(kind, FILE.fields.get(number), 1)
        if walk.at != len(index):
            raise ValueError
    except (ValueError, LookupError) as error:
        raise ValueError("has no readable index: damaged") from error
    return Size(len(names), row_groups, max(names, default=0), taken + walk.bytes)


def _names(walk: thrift.Walk) -> tuple[list[int], int]:
    """Bytes of each name of the schema that begins, and memory for the whole ones: groups come before what is in them."""
    names, taken = [], 0
    groups: list[tuple[int, int]] = []
    """That are not complete: how many are missing, and the bytes of a name in it."""
    for _ in range(walk.list(SCHEMA)[0]):
        found = walk.struct(SCHEMA.struct, 2)
        names.append(found[NAME])
        name = (groups[-1][1] if groups else 0) + NAME_BYTES + LETTER_BYTES * found[NAME]
        taken += name
        if groups:
            groups[-1] = groups[-1][0] - 1, groups[-1][1]
        if (children := found.get(CHILDREN, 0)) > 0:
            groups.append((children, name))
        while groups and not groups[-1][0]:
            groups.pop()
    return names, taken
