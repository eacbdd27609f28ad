"""What a reader takes to open a Parquet file, by the file's index.

An index of a megabyte may take gigabytes: each column gets the names of all groups that it lies in, and what is left out
of a struct takes memory as well. Looks at nothing else in it.
Source: the format's parquet.thrift (FileMetaData, SchemaElement), and pyarrow as measured.
"""

from mdt_ray import thrift
from mdt_ray.thrift import BINARY, INT32, LIST, STRUCT

SCHEMA, NAME, CHILDREN = (2, LIST), (4, BINARY), (5, INT32)
"""Where they are in their struct."""
STRUCT_BYTES, NAME_BYTES, LETTER_BYTES = 1024, 64, 8
"""Memory for a struct of a list, and for each name in a column's whole one."""


def memory_of(index: memoryview) -> int:
    """Bytes that pyarrow takes for an index, to a factor of two or so. Raises ValueError for what is none."""
    walk, taken, number = thrift.Walk(index), 0, 0
    try:
        while field := walk.field(number):
            number, kind = field
            taken += _names(walk) if field == SCHEMA else 0 * walk.value(kind, 1)
    except (ValueError, LookupError) as error:
        raise ValueError("has no readable index: damaged") from error
    return taken + STRUCT_BYTES * walk.structs


def _names(walk: thrift.Walk) -> int:
    """Bytes for the whole names of the columns of the schema that begins: groups come before what is in them."""
    taken = 0
    groups: list[tuple[int, int]] = []
    """That are not complete: how many are missing, and the bytes of a name in it."""
    size, kind = walk.list()
    if kind != STRUCT:
        raise ValueError
    for _ in range(size):
        found = walk.struct(2)
        name = (groups[-1][1] if groups else 0) + NAME_BYTES + LETTER_BYTES * found[NAME]
        if groups:
            groups[-1] = groups[-1][0] - 1, groups[-1][1]
        if (children := found.get(CHILDREN, 0)) > 0:
            groups.append((children, name))
        else:
            taken += name
        while groups and not groups[-1][0]:
            groups.pop()
    return taken
