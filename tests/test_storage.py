"""Files at URIs: whole or not at all."""

import pytest

from mdt_ray import storage
from tests import s3


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
    for name, value in s3.KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "UPLOAD_BYTES", 1000)
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
    assert list(tmp_path.iterdir()) == [], "no temporary file is left"


def test_folders_are_published_whole(tmp_path):
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "x").write_text("x")
    (made / "done").write_text("")
    storage.publish_folder(made, str(tmp_path / "out" / "final"), last="done")
    assert not made.exists()
    assert (tmp_path / "out" / "final" / "sub" / "x").read_text() == "x"
    assert storage.list_names(str(tmp_path / "out")) == ["final"]
    assert storage.fetch_folder(str(tmp_path / "out" / "final"), "unused") == tmp_path / "out" / "final"


def test_uris_join_before_their_query():
    assert storage.join("s3://bucket/a?endpoint_override=h", "b", "c") == "s3://bucket/a/b/c?endpoint_override=h"
    assert storage.join("runs/x/", "y") == "runs/x/y"


def test_unknown_schemes_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"cannot open 'ftp://x/y'.*use a local path or s3://"):
        storage.resolve("ftp://x/y")


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
