"""Thrift's compact protocol, read as strictly as it is written, so that no other reader takes bytes for something else.

Parquet's headers and indices are in it. Not a parser of them: it keeps whole numbers and lengths, and steps over the rest.
Source: Thrift's specification, "compact protocol encoding".
"""

FLAGS, BYTE, INTEGERS, INT32, DOUBLE, BINARY, LIST, STRUCT = {1, 2}, 3, {4, 5, 6}, 5, 7, 8, 9, 12
"""Types of values."""
LAST = 64
"""Number that no field of Parquet reaches."""
DEEPEST = 12
"""Structs and lists in each other, at most: Parquet's are 7."""
Numbers = dict[tuple[int, int], int]
"""Of a struct: whole numbers, and lengths of texts and lists, by the number and the type of their field. (A reader steps
over a field of another type than it knows.)"""


class Walk:
    """Bytes, and where in them the next value begins. All raise ValueError or IndexError for what is damaged."""

    def __init__(self, data: memoryview, at: int = 0):
        self.data, self.at = data, at
        self.structs = 0
        """In lists, so far."""

    def struct(self, depth: int = 0) -> Numbers:
        found: Numbers = {}
        number = 0
        while field := self.field(number):
            number, kind = field
            found[field] = self.value(kind, depth + 1)
        return found

    def field(self, before: int) -> tuple[int, int] | None:
        """Number and type of the field that begins; None where the struct ends."""
        head = self.data[self.at]
        self.at += 1
        if not head:
            return None
        step, kind = divmod(head, 16)
        if not step or before + step > LAST:  # a number in full, which no field here needs, or one that wraps around
            raise ValueError
        return before + step, kind

    def value(self, kind: int, depth: int) -> int:
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
            self.struct(depth)
        elif kind == LIST:
            size, kind = self.list()
            for _ in range(size):
                self.value(BYTE if kind in FLAGS else kind, depth + 1)
            return size
        elif kind in (BYTE, DOUBLE):
            self.at += 1 if kind == BYTE else 8
        elif kind not in FLAGS:
            raise ValueError
        return 0

    def list(self) -> tuple[int, int]:
        """Size and type of the values of the list that begins."""
        size, kind = divmod(self.data[self.at], 16)
        self.at += 1
        size = self.length() if size == 15 else size
        if size > len(self.data) - self.at:  # each has a byte
            raise ValueError
        self.structs += size if kind == STRUCT else 0
        return size, kind

    def length(self) -> int:
        length = self.varint()
        if length >= 2**31:
            raise ValueError
        return length

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError
