"""Files at URIs: whole or not at all."""

import pytest

from mdt_ray import storage


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
