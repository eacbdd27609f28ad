"""What lies on a machine that others use too."""

import os
import stat

import pytest

from mdt_ray import scratch


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder for temporary files that all may write to."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_there_for_a_while_is_its_users_alone(shared):
    before = os.umask(0)
    try:
        folder = scratch.private_folder()
    finally:
        os.umask(before)
    assert (folder.parent, mode(folder)) == (shared, 0o700)
    assert scratch.new_path().parent == folder
    folder.chmod(0o755)
    assert mode(scratch.private_folder()) == 0o700


@pytest.mark.parametrize("kind", ["link", "file", pytest.param("folder", marks=pytest.mark.skipif(
    os.getuid() != 0, reason="needs root, to give a folder away"))])
def test_a_name_that_another_user_took_is_not_used(shared, kind):
    name, theirs = shared / f"mdt_ray-{os.getuid()}", shared / "theirs"
    theirs.mkdir(mode=0o777)
    if kind == "link":
        name.symlink_to(theirs)
    elif kind == "file":
        name.touch()
    else:
        name.mkdir(mode=0o777)
        os.chown(name, 12345, 12345)
    with pytest.raises(PermissionError, match=r"must be a folder of user \d+, .* and is (none|a folder of user 12345), "):
        scratch.new_path()
    assert os.listdir(theirs) == []
