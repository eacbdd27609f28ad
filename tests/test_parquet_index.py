"""What opening Parquet takes by its index, against pyarrow's own memory for indices made to take much, and damage."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdt_ray import parquet_index, storage, tables
from tests.conftest import ROOT


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def text(value: bytes) -> bytes:
    return b"\x18" + varint(len(value)) + value


def group(name: bytes, children: int) -> bytes:
    return b"\x35\x02" + text(name) + b"\x15" + varint(2 * children) + b"\x00"


def column(name: bytes) -> bytes:
    return b"\x15\x02\x25\x02" + text(name) + b"\x00"


def structs(*found: bytes) -> bytes:
    return (bytes([16 * len(found) + 12]) if len(found) < 15 else b"\xfc" + varint(len(found))) + b"".join(found)


def index(schema: list[bytes], groups: bytes = b"\x0c") -> bytes:
    return b"\x15\x04\x19" + structs(*schema) + b"\x16\x00\x19" + groups + b"\x00"


def write_bytes(made: bytes) -> bytes:
    return b"PAR1" + made + len(made).to_bytes(4, "little") + b"PAR1"


def write(path, made: bytes):
    path.write_bytes(write_bytes(made))
    return path


PLAIN = [group(b"schema", 1), column(b"x")]
LETTERS = "\N{GRINNING FACE}".encode() + b"a" * 1000
"""Of a name, of which Python takes four bytes for each."""


def chains(count: int, levels: int = 96) -> bytes:
    """Columns that each lie in groups of their own."""
    names = [[group(LETTERS if 0 < k < 7 else b"%d" % i if k == 0 else b"", 1) for k in range(levels)] for i in range(count)]
    return index([group(b"schema", count), *(part for chain in names for part in [*chain, column(b"")])])


def parts(columns: int, paths: bytes = b"") -> bytes:
    """A row group with columns of which nothing is told but their paths."""
    return structs(b"\x19" + structs(*[b"\x26\x00" + paths + b"\x00"] * columns) + b"\x16\x00\x16\x00\x00")


def empty(columns: int, row_groups: int) -> bytes:
    return index([group(b"schema", columns)] + [column(b"%d" % i) for i in range(columns)],
                 structs(*[b"\x19\x0c\x16\x00\x16\x00\x00"] * row_groups))


MADE = {
    "names": (index([group(b"", 1)] + [group(b"a" * 1024, 1)] * 4 + [group(LETTERS, 4000)]
                    + [column(b"%d" % i) for i in range(4000)]), "bytes in memory"),
    "chains": (chains(40), "bytes in memory"),
    "parts": (index(PLAIN, parts(200_000)), "bytes in memory"),
    "paths": (index(PLAIN, parts(18, b"\x1c\x39\xf8" + varint(900_000) + bytes(900_000) + b"\x00")), "bytes in memory"),
    "row groups": (empty(1, 2 * 10**6), "bytes in memory"),
    "columns": (empty(4096, 0), "columns, more"),
    "places": (empty(4000, 263), "columns in all row groups"),
    "name": (index([group(b"schema", 1), column(b"a" * 1025)]), "bytes for a name"),
    "long": (index(PLAIN) + bytes(2**24), "bytes: not read")}


def growth(code: str, path) -> tuple[str, float]:
    """What a process prints that opens a file, and the MiB that it grew by meanwhile."""
    code = (f"import sys\nimport pyarrow.parquet as pq\nfrom mdt_ray import tables\n"
            "def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if 'VmHWM' in line)\n"
            f"before = peak()\ntry:\n    {code}\nexcept (OSError, ValueError) as error:\n    print(error)\n"
            "print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    *told, size = done.stdout.splitlines()
    return " ".join(told), int(size) / 2**10


@pytest.mark.parametrize("kind", MADE)
def test_an_index_that_takes_much_memory_or_time_is_not_opened(tmp_path, kind):
    made, what = MADE[kind]
    told, size = growth("tables.read_values(sys.argv[1])", write(tmp_path / "x.parquet", made))
    assert "x.parquet: has an index " in told
    assert what in told
    assert "not read; write it with larger row groups" in told
    assert size < 200


def test_what_an_index_may_have_at_most_is_opened(tmp_path):
    for made in (empty(4095, 0), empty(4000, 0), index([group(b"schema", 1), column(b"a" * 1024)])):
        with pa.OSFile(str(write(tmp_path / "x.parquet", made))) as handle:
            assert tables.open_handle(handle).num_row_groups == 0


def test_what_is_told_of_an_index_is_about_what_it_takes(tmp_path):
    made = {"names": index([group(b"s", 1), group(b"a" * 10**3, 20_000), *[column(b"%d" % i) for i in range(20_000)]]),
            "deep": index([group(b"", 1)] * 95 + [group(b"", 20_000)] + [column(b"")] * 20_000),
            "chains": chains(100),
            "columns": index([group(b"schema", 50_000)] + [column(b"")] * 50_000),
            "parts": index(PLAIN, parts(100_000))}
    for kind, data in made.items():
        _, size = growth("pq.ParquetFile(sys.argv[1]).schema_arrow", write(tmp_path / "x.parquet", data))
        assert 0.2 < size * 2**20 / parquet_index.size_of(data).memory < 2.5, kind


def test_an_index_that_is_another_when_it_is_read_again_is_told():
    """As a store gives that has the file replaced meanwhile."""
    made = write_bytes(index(PLAIN)[:-1] + b"\x19\x1c" + text(b"a" * 2**17) + b"\x00\x00")

    class Changing:
        def size(self) -> int:
            return len(made)

        def read_at(self, size: int, offset: int) -> bytes:
            return made[offset:] if size == tables.TAIL_BYTES else made[offset:-8] + b"\x07\x00\x00\x00PAR1"

    with pytest.raises(ValueError, match="changed while it was read"):
        tables.open_handle(Changing())


@pytest.mark.parametrize("number", [16, 18, 32767])
def test_fields_that_parquet_may_get_are_stepped_over(tmp_path, number):
    """In full, as their number is more than 15 after the one before: kinds of values (geometries are 17), extensions."""
    kind = bytes([0x0c]) + varint(2 * number) + b"\x00"
    made = index([group(b"schema", 1), column(b"x")[:-1] + b"\x6c" + kind + b"\x00\x00"])[:-1]
    with pa.OSFile(str(write(tmp_path / "x.parquet", made + kind + b"\x00"))) as handle:
        assert tables.open_handle(handle).schema_arrow.names == ["x"]


HUGE = b"\xfc" + varint(999_999)
"""A list of structs that are not there, for which a reader makes room at once."""


@pytest.mark.parametrize("made", [
    b"\x15\x04\x19" + HUGE, index(PLAIN, HUGE + b"\x19" + HUGE), index(PLAIN, HUGE + b"\x19" + HUGE + b"\x3c\x89" + HUGE),
    # Nine bytes by their type, and row groups to a reader that knows better, with another schema behind them.
    b"\x15\x04\x19" + structs(*PLAIN) + b"\x16\x00\x19\x93" + b"\xf8\x09" + bytes(9) + index(PLAIN)[3:]])
def test_lists_that_readers_take_for_others_are_damage(tmp_path, made):
    told, size = growth("tables.read_values(sys.argv[1])", write(tmp_path / "x.parquet", made))
    assert "x.parquet: has no readable index: damaged" in told
    assert size < 20


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.6"])
def test_ordinary_files_are_opened_whatever_is_in_them(tmp_path, version, compression):
    rows = 2000
    pairs = pa.array([{"bytes": b"x" * (i % 7), "path": f"a/{i}"} for i in range(rows)])
    table = pa.table({"id": [f"{i}" for i in range(rows)], "label": np.arange(rows), "share": np.arange(rows) / 7,
                      "when": pa.array(range(rows), pa.timestamp("us", "UTC")), "held": [i % 2 == 0 for i in range(rows)],
                      "half": np.arange(rows, dtype=np.float16), "pair": pairs, "many": [[i] * (i % 3) for i in range(rows)],
                      "none": pa.nulls(rows), "some": [None if i % 3 else i for i in range(rows)]},
                     metadata={"mdt_ray.note": "x" * 10_000})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=5, version=version, compression=compression,
                   write_page_index=True, store_decimal_as_integer=True)
    with pa.OSFile(str(tmp_path / "x.parquet")) as handle:
        file = tables.open_handle(handle)
        assert file.metadata.serialized_size > tables.TAIL_BYTES
        assert file.num_row_groups == 400
        assert file.schema_arrow.names == table.schema.names
        names = ["id", "label", "share", "held", "half", "none", "some"]
        assert tables.values(file, handle, [*names, "pair.path"]) == {
            **table.select(names).to_pydict(), "pair.path": [f"a/{i}" for i in range(rows)]}


def test_a_table_keeps_its_own_notes_and_none_of_arrows(tmp_path):
    path = str(tmp_path / "x.parquet")
    tables.write(path, pa.table({"a": ["x", "y"]}, metadata={"mdt_ray.place": "here"}))
    for _ in range(3):
        found = tables.read(path)
        assert found.schema.metadata == {b"mdt_ray.place": b"here"}
        tables.write(path, found)


def test_a_plan_of_many_parts_is_opened(tmp_path):
    """Twenty thousand, as a million pictures make in chunks of 64."""
    path = str(tmp_path / "plan.parquet")
    table = pa.table({name: np.arange(20_000) for name in ("index", "label", "offset", "size", "file")})
    tables.write(path, table, row_group_size=1)
    with pa.OSFile(path) as handle:
        assert tables.open_handle(handle).num_row_groups == 20_000


def test_damage_is_no_outage_of_a_store(tmp_path):
    """pyarrow tells both as OSError: here of groups in each other, deeper than it goes."""
    path = write(tmp_path / "x.parquet", index([group(b"a", 1)] * 200 + [column(b"x")]))
    with pytest.raises(ValueError, match=r"x.parquet: Parquet schema too deeply nested"), storage.outages_told():
        tables.read(str(path))


def test_row_groups_of_other_columns_are_damage(tmp_path):
    path = write(tmp_path / "x.parquet", index([group(b"s", 2), column(b"x"), column(b"y")], parts(1)))
    with pytest.raises(ValueError, match=r"x.parquet: has row groups of other columns than its schema: damaged"):
        tables.read(str(path))


TRUE = index([group(b"schema", 2), group(b"a", 1), column(b"b"), column(b"c")])


def test_names_are_those_of_their_groups_too():
    """schema, schema.a, schema.a.b, and schema.c; four structs."""
    letters, names = len("schema" "schemaa" "schemaab" "schemac"), 1 + 2 + 3 + 2
    memory = letters * parquet_index.LETTER_BYTES + names * parquet_index.NAME_BYTES + 4 * parquet_index.SCHEMA.bytes
    assert parquet_index.size_of(TRUE) == parquet_index.Size(4, 0, len("schema"), memory)


@pytest.mark.parametrize("made", [
    b"", TRUE[:-1], TRUE[:9], b"\xff" * 40,
    TRUE[:-1] + b"\x09\x04" + TRUE[3:],  # another schema, with its number in full
    TRUE[:-1] + b"\x01\x08\x00", TRUE[:-1] + b"\x01\x15\x00",  # the last field again, and one of number -11
    TRUE[:-1] + b"\x01\x80\x80\x04\x00", TRUE[:-1] + b"\x01\xfe\xff\x03\x11\x00",  # numbers that wrap around
    TRUE.replace(b"\x19\x4c", b"\x19\x48", 1),  # of texts
    TRUE.replace(b"\x19\x4c", b"\x19\xfc\xff\xff\xff\xff\x07", 1),  # of more than there are bytes
    TRUE.replace(b"\x18\x01b", b"\x15\x01\x00", 1),  # a column without a name
    TRUE.replace(b"\x18\x01b", b"\x18\xff\xff\xff\xff\x07b", 1),
    TRUE + b"\x00",
    TRUE[:-1] + b"\xb9" + b"\x19" * 39 + b"\x00\x00",  # lists in lists
    TRUE[:-1] + b"\x1b\x00", TRUE[:-1] + b"\x17" + bytes(7)])  # a type that Parquet does not use; a number cut short
def test_damaged_indices_are_told(made):
    with pytest.raises(ValueError, match="has no readable index: damaged"):
        parquet_index.size_of(made)


@pytest.mark.parametrize("made", [
    b"PAR1", b"", b"x" * 100, b"PAR1" + b"\xff\xff\xff\x00PAR1", b"PAR1" + bytes(20) + b"PARE"])
def test_what_does_not_end_as_parquet_is_told(tmp_path, made):
    (tmp_path / "x.parquet").write_bytes(made)
    with pytest.raises(ValueError, match=r"x.parquet: does not end as a Parquet file does: cut off, or none"):
        tables.read(str(tmp_path / "x.parquet"))
