"""Files at URIs: whole or not at all."""

import collections
import errno
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError

from mdt_ray import scratch, storage, tables
from tests import s3
from tests.conftest import ROOT


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    uri = str(tmp_path / "a" / "b.bin")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.list_names(str(tmp_path / "a")) == ["b.bin"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    uri = str(tmp_path / "b.bin")
    storage.write_bytes(uri, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(uri, "not bytes")
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(str(tmp_path)) == ["b.bin"]


def test_a_file_made_piece_by_piece_appears_whole(tmp_path):
    uri = str(tmp_path / "a" / "b.bin")
    storage.write_bytes(uri, b"old")
    with storage.create_file(uri) as path:
        path.write_bytes(b"one")
        assert storage.read_bytes(uri) == b"old"
        assert path.parent == tmp_path / "a", "a rename within one disk"
        with path.open("ab") as file:
            file.write(b", two")
    assert storage.read_bytes(uri) == b"one, two"
    assert storage.list_names(str(tmp_path / "a")) == ["b.bin"]


def fail_halfway(uri, error):
    with storage.create_file(uri) as path:
        path.write_bytes(b"half")
        raise error


@pytest.mark.parametrize(("error", "expected", "message"), [
    (ValueError("bad part"), ValueError, "^bad part$"),
    (OSError(28, "No space left on device"), OSError, r"b.bin: could not be written \(No space left on device\); make room"),
])
def test_a_file_that_fails_halfway_keeps_the_old_one(tmp_path, error, expected, message):
    uri = str(tmp_path / "b.bin")
    storage.write_bytes(uri, b"old")
    with pytest.raises(expected, match=message):
        fail_halfway(uri, error)
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(str(tmp_path)) == ["b.bin"]


def test_what_a_killed_maker_left_is_cleared(tmp_path):
    with storage.create_file(str(tmp_path / "b.bin")) as path:
        path.write_bytes(b"half")
        storage.clear_leftovers(str(tmp_path))
        assert storage.list_names(str(tmp_path)) == []
        path.write_bytes(b"whole")


def test_a_file_goes_to_a_store_in_parts(tmp_path, monkeypatch):
    s3.give_keys(monkeypatch)
    monkeypatch.setattr(storage, "PART_BYTES", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = bytes(range(256)) * 41
    with s3.serve() as store:
        with storage.create_file(store.uri("a/b.bin")) as path:
            path.write_bytes(data)
            assert store.objects("a") == {}
        assert store.objects("a") == {"b.bin": data}
        with pytest.raises(ValueError, match="bad part"):
            fail_halfway(store.uri("a/c.bin"), ValueError("bad part"))
        assert list(store.objects("a")) == ["b.bin"]
    assert os.listdir(scratch.private_folder()) == [], "no temporary file is left"


def _fill(uri: str, error: Exception | None = None) -> None:
    with storage.create_folder(uri, last="done") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("x")
        (folder / "done").write_text("")
        if error:
            raise error


def test_folders_are_created_whole(tmp_path):
    final = tmp_path / "out" / "final"
    with pytest.raises(RuntimeError, match="bad"):
        _fill(str(final), RuntimeError("bad"))
    assert storage.list_names(str(tmp_path / "out")) == []
    for place in (str(final), f"{final}/"):
        _fill(place)
        assert (final / "sub" / "x").read_text() == "x"
        (final / "old").write_text("")  # not of the folder that comes in its place
        assert storage.list_names(str(tmp_path / "out")) == ["final"]
    with storage.fetched(str(final)) as there:
        assert there == final


def test_folders_in_a_store_are_created_whole(monkeypatch):
    s3.give_keys(monkeypatch)
    with s3.serve() as store:
        with pytest.raises(OSError, match=r"folder\?.*: could not be written"):
            _fill(store.uri("folder"), OSError("bad"))
        assert store.objects("folder") == {}
        _fill(store.uri("folder"))
        assert store.objects("folder") == {"sub/x": b"x", "done": b""}
        times = store.times("folder")
        assert times["done"] >= times["sub/x"]


def test_a_folder_in_a_store_is_not_whole_while_another_comes_in_its_place(monkeypatch):
    """One that was killed meanwhile would have files of both, and the old mark."""
    s3.give_keys(monkeypatch)
    with s3.serve() as store, s3.forwarded(store) as line:
        _fill(store.uri("folder"))
        there: list[bool] = []
        line.before = lambda request: there.append("done" in store.objects("folder")) if "PUT" in request else None
        _fill(line.uri("folder"))
        assert len(there) >= 2
        assert not any(there)
        assert set(store.objects("folder")) == {"sub/x", "done"}


@pytest.mark.parametrize(("error", "free", "text"), [
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 4096, "Disk quota exceeded"),
    (RuntimeError("unexpected pos 64 vs 0"), 4096, "No space left on device at "),
    (SafetensorError("I/O error: No space left on device (os error 28)"), 2**30, "No space left on device at ")])
def test_a_full_disk_is_told_from_other_errors(tmp_path, monkeypatch, error, free, text):
    """What writes weights does not say so itself, or in words only; others may have made room since."""
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: collections.namedtuple("Usage", "free")(free))
    with pytest.raises(storage.NoRoom, match=text):
        _fill(str(tmp_path / "final"), error)
    assert list(tmp_path.iterdir()) == []


def test_uris_join_before_their_query():
    assert storage.join("s3://bucket/a?endpoint_override=h", "b", "c") == "s3://bucket/a/b/c?endpoint_override=h"
    assert storage.join("runs/x/", "y") == "runs/x/y"


def test_unknown_schemes_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"cannot open 'ftp://x/y'.*use a local path or s3://"):
        storage.resolve("ftp://x/y")


@pytest.mark.parametrize(("answers", "raised"), [
    (["When resolving region for bucket 'b': AWS Error NETWORK_CONNECTION", None], None),
    (["When resolving region for bucket 'b': AWS Error NETWORK_CONNECTION"] * 2, OSError),
    (["When resolving region for bucket 'b': AWS Error ACCESS_DENIED", None], OSError),
    (["Bucket 'b' not found"], ValueError)])
def test_the_region_of_a_bucket_is_asked_for_again(monkeypatch, answers, raised):
    """Over a network that is away for a moment: no bad setting, which would end a job."""
    left = iter(answers)

    class FileSystem:
        @staticmethod
        def from_uri(uri: str):
            error = next(left)
            if error:
                raise OSError(error)
            return "opened"

    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0,))
    monkeypatch.setattr(storage.pafs, "FileSystem", FileSystem)
    if raised is None:
        assert storage.resolve("s3://b/x") == "opened"
    else:
        with pytest.raises(raised) as caught:
            storage.resolve("s3://b/x")
        assert type(caught.value) is raised


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x.json: damaged JSON"):
        storage.read_json(str(tmp_path / "x.json"))


def test_remove_takes_files_folders_and_nothing(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("")
    storage.remove(str(tmp_path / "d"))
    storage.remove(str(tmp_path / "none"))
    assert storage.list_names(str(tmp_path)) == []


@pytest.mark.slow
def test_a_store_that_refuses_for_a_while_loses_nothing(monkeypatch):
    """Longer than the SDK itself tries (some 6 s): what is there stays, and the write comes after all."""
    s3.give_keys(monkeypatch)
    monkeypatch.setattr(storage, "RETRY_SECONDS", ())
    with s3.serve() as store, s3.forwarded(store) as line:
        storage.write_bytes(line.uri("a/lock.json"), b"of old, and longer")
        with line.cut():
            with pytest.raises(OSError, match="could not be written"):
                storage.write_bytes(line.uri("a/lock.json"), b"new")
        assert store.objects("a") == {"lock.json": b"of old, and longer"}
        monkeypatch.setattr(storage, "RETRY_SECONDS", (1.0, 1.0, 1.0))
        with line.cut(7.0):
            storage.write_bytes(line.uri("a/lock.json"), b"new")
        assert store.objects("a") == {"lock.json": b"new"}


@pytest.mark.parametrize("size", [1, 50])
def test_an_object_that_is_replaced_while_it_is_read_is_read_again(monkeypatch, size):
    """Shorter or longer: pyarrow returns as many bytes as it had before, with remains of memory at the end."""
    s3.give_keys(monkeypatch)
    with s3.serve() as store, s3.forwarded(store) as line:
        def check(name: str, first: bytes, second: bytes, read: Callable[[str], object], expected: object) -> None:
            store.put(name, first)
            line.before = lambda request: store.put(name, second) if request == f"GET /{s3.BUCKET}/{name}" else None
            assert read(line.uri(name)) == expected

        check("lock.json", json.dumps({"a": "x" * 20}).encode(), json.dumps({"a": "y" * size}).encode(), storage.read_json,
              {"a": "y" * size})
        first, second = (io.BytesIO(), io.BytesIO())
        for count, file in ((20, first), (size, second)):
            pq.write_table(pa.table({"a": range(count)}), file)
        check("metrics.parquet", first.getvalue(), second.getvalue(), lambda uri: tables.read(uri)["a"].to_pylist(),
              list(range(size)))
        store.put("damaged.json", b"{")
        with pytest.raises(ValueError, match=r"damaged.json.*: damaged JSON"):
            storage.read_json(store.uri("damaged.json"))


def test_a_folder_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch):
    s3.give_keys(monkeypatch)
    monkeypatch.setattr(storage, "RETRY_SECONDS", (1.0, 1.0, 1.0))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with s3.serve() as store, s3.forwarded(store) as line:
        store.put("a/sub/x", b"x")
        store.put("a/y", b"")
        with line.cut(7.0), storage.fetched(line.uri("a")) as there:
            assert sorted(p.relative_to(there).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == ["sub/x", "y"]
        store.put("a/../../evil", b"evil")
        with pytest.raises(ValueError, match=r"holds a file '../../evil', which is outside of it; delete that"), \
                storage.fetched(store.uri("a")):
            raise AssertionError
        assert os.listdir(scratch.private_folder()) == []


def test_a_copy_of_a_killed_process_goes_with_the_next(monkeypatch, tmp_path):
    s3.give_keys(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with s3.serve() as store:
        store.put("a/x", b"x")
        code = ("import os, sys\nfrom mdt_ray import storage\nwith storage.fetched(sys.argv[1]) as there:\n"
                "    assert (there / 'x').is_file()\n    os.kill(os.getpid(), 9)")
        killed = subprocess.run([sys.executable, "-c", code, store.uri("a")], cwd=ROOT,
                                env=os.environ | {"TMPDIR": str(tmp_path)})
        mine = scratch.private_folder()
        assert (killed.returncode, len(os.listdir(mine))) == (-9, 1)
        with storage.fetched(store.uri("a")) as there:
            assert list(mine.iterdir()) == [there]


def test_a_write_that_broke_off_leaves_no_part_of_it(monkeypatch):
    """The stream completes an upload when it is closed, whatever went wrong before."""
    s3.give_keys(monkeypatch)
    monkeypatch.setattr(storage, "RETRY_SECONDS", ())
    with s3.serve() as store, storage.create_file(store.uri("a/y")) as path:
        path.write_bytes(b"whole")
        fs, there = storage.resolve(store.uri("a/x"))

        def parts():
            yield bytes(11 * 2**20)
            raise OSError("broke off")

        with pytest.raises(OSError, match=f"{11 * 2**20} bytes arrived of {12 * 2**20}"):
            storage._write_object(fs, there, parts, 12 * 2**20)
        with pytest.raises(OSError, match="broke off"):
            storage._write_object(fs, there, parts, 4)
        assert store.objects("a") == {}


def test_a_small_object_takes_one_request(monkeypatch):
    s3.give_keys(monkeypatch)
    with s3.serve() as store, s3.forwarded(store) as line:
        line.requests.clear()
        storage.write_bytes(line.uri("a/lock.json"), b"{}")
        assert line.requests == ["PUT /pictures/a/lock.json"]
        large = bytes(storage.PUT_BYTES) + b"the end"
        storage.write_bytes(line.uri("a/weights"), large)
        assert store.objects("a") == {"lock.json": b"{}", "weights": large}


def test_what_killed_writers_left_on_this_machine_is_deleted(tmp_path, monkeypatch):
    s3.give_keys(monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = ("import os\nfrom mdt_ray import storage\n"
            "with storage.create_folder(os.environ['URI'], last='x') as folder:\n"
            "    (folder / 'x').write_text('x')\n    os.kill(os.getpid(), 9)\n")
    with s3.serve() as store:
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"URI": store.uri("a"), "TMPDIR": str(tmp_path)})
        mine = scratch.private_folder()
        killed, = (path.parent for path in mine.glob("*/x"))
        space = killed.name.partition("-")[0]
        kept = {"ray", f"{space}-sketches", f"12345678-{2**22 + 1}-another-container's"}
        for name in kept | {f"{space}-99999999999-no-process's-number"}:
            (mine / name).touch()
        _fill(store.uri("b"))
        assert set(os.listdir(mine)) == kept
        assert set(store.objects("b")) == {"sub/x", "done"}
