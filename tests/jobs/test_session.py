"""Who may ask anything of a local Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from mdt_ray import scratch
from mdt_ray.jobs import session


@pytest.mark.ray
def test_a_local_ray_answers_nobody_without_its_token(ray_session):
    """Its ports are open to the network, for Ray knows no other way."""
    code = "import ray; ray.init(logging_level='ERROR'); print('in', len(ray.nodes()))"
    mine = session.environment()
    for environment, is_in in ((mine, True), (mine | {"RAY_AUTH_MODE": "disabled"}, False)):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90)
        assert ("in 1" in done.stdout, done.returncode == 0) == (is_in, is_in), done.stderr[-2000:]
        assert is_in or "auth" in done.stderr.lower()


@pytest.mark.ray
def test_what_a_local_ray_runs_nobody_else_can_write(ray_session):
    """Ray makes its own folders for all to write to."""
    socket, = (Path(node["ObjectStoreSocketName"]) for node in ray.nodes())
    assert socket.is_relative_to(scratch.private_folder() / "ray")


def test_rays_folder_is_short_enough_for_its_sockets(tmp_path, monkeypatch):
    """Batch systems give each job a long one for temporary files."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / "alice.12345678.0" / "temporary-files-of-the-job"
    long.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert session.ray_folder() == f"/tmp/mdt_ray-{os.getuid()}/ray"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", "mine")
    assert session.ray_folder() == f"{tmp_path}/mine/ray"


@pytest.mark.parametrize("held", [None, "theirs"])
def test_the_token_is_its_users_alone(tmp_path, monkeypatch, held):
    """Ray makes it for all to read."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / ".ray" / "auth_token"
    if held:
        token.parent.mkdir()
        token.write_text(held)
        token.chmod(0o644)
    session.keep_token()
    made = token.read_text()
    assert made == held or len(made) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    session.keep_token()
    assert token.read_text() == made
    assert os.listdir(token.parent) == ["auth_token"]


def test_where_no_token_is_asked_for_none_is_made(tmp_path, monkeypatch):
    """There may be nowhere to write it."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "none")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    session.keep_token()
    assert not (tmp_path / "none").exists()
