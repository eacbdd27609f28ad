"""Thrift's compact protocol, read as strictly as it is written.

Parquet's headers and indices are in it. Not a parser of them: it keeps whole numbers and lengths, and steps over the rest.
Readers take a list that they know for one of the values that they expect, whatever type it names; so must who looks first,
and says which lists there are.
Source: Thrift's specification, "compact protocol encoding".
"""

from dataclasses import dataclass, field

FLAGS, BYTE, INTEGERS, INT32, INT64, DOUBLE, BINARY, LIST, STRUCT = {1, 2}, 3, {4, 5, 6}, 5, 6, 7, 8, 9, 12
"""Types of values."""
LAST = 2**15 - 1
"""Number of a field, at most."""
DEEPEST = 12
"""Structs and lists in each other, at most: Parquet's are 7."""
Numbers = dict[tuple[int, int], int]
"""Of a struct: whole numbers, and lengths of texts and lists, by the number and the type of their field. (A reader steps
over a field of another type than it knows.)"""


@dataclass(frozen=True)
class Struct:
    """Fields of a struct that hold lists, somewhere, by their number."""

    fields: "dict[int, Struct | List]" = field(default_factory=dict)


@dataclass(frozen=True)
class List:
    """Of values that are of one type, each of which takes some memory."""

    kind: int
    bytes: int
    struct: Struct = Struct()


class Walk:
    """Bytes, and where in them the next value begins. All raise ValueError or IndexError for what is damaged."""

    def __init__(self, data: memoryview | bytes):
        self.data, self.at = data, 0
        self.bytes = 0
        """For the known lists so far."""

    def struct(self, known: Struct, depth: int) -> Numbers:
        found: Numbers = {}
        number = 0
        while place := self.field(number):
            number, kind = place
            found[place] = self.value(kind, known.fields.get(number), depth + 1)
        return found

    def field(self, before: int) -> tuple[int, int] | None:
        """Number and type of the field that begins; None where the struct ends."""
        head = self.data[self.at]
        self.at += 1
        if not head:
            return None
        number = before + (head >> 4)
        if head < 16:  # a number in full, as it is more than 15 after the one before
            number, negative = divmod(self.varint(), 2)
            if negative or number <= before:  # a field again, which readers would take
                raise ValueError
        if number > LAST:  # it wraps around
            raise ValueError
        return number, head & 15

    def value(self, kind: int, known: Struct | List | None, depth: int) -> int:
        """A whole number, the length of a text or a list; 0 for others."""
        if kind in INTEGERS:
            value = self.varint()
            if kind == INT32 and value >= 2**32:  # readers take what fits
                raise ValueError
            return (value >> 1) ^ -(value & 1)
        if kind == BINARY:
            length = self.length()
            self.at += length
            return length
        if depth == DEEPEST:
            raise ValueError
        if kind == STRUCT:
            self.struct(known if isinstance(known, Struct) else Struct(), depth)
        elif kind == LIST:
            size, kind = self.list(known if isinstance(known, List) else None)
            inner = known.struct if isinstance(known, List) else None
            for _ in range(size):
                self.value(BYTE if kind in FLAGS else kind, inner, depth + 1)
            return size
        elif kind in (BYTE, DOUBLE):
            self.at += 1 if kind == BYTE else 8
        elif kind not in FLAGS:
            raise ValueError
        return 0

    def list(self, known: List | None) -> tuple[int, int]:
        """Size and type of the values of the list that begins."""
        size, kind = self.data[self.at] >> 4, self.data[self.at] & 15
        self.at += 1
        size = self.length() if size == 15 else size
        if size > len(self.data) - self.at:  # each has a byte
            raise ValueError
        if known and size:
            if kind != known.kind:
                raise ValueError
            self.bytes += size * known.bytes
        return size, kind

    def length(self) -> int:
        length = self.varint()
        if length >= 2**31:
            raise ValueError
        return length

    def varint(self) -> int:
        value = self.data[self.at]
        self.at += 1
        if value < 128:
            return value
        value &= 127
        for shift in range(7, 70, 7):
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError
