"""Where things lie on this machine for a while, its user's alone: what goes to a store or comes from it, and Ray's sockets.

Not for what another process should find: that is under its own name in a run's folder.
"""

import os
import shutil
import stat
import tempfile
import uuid
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from mdt_ray import processes


def private_folder(root: str | None = None) -> Path:
    """A folder for temporary files that nobody else on this machine may look into, made where it is missing.

    Args:
        root: where; None takes TMPDIR, else /tmp.
    Raises PermissionError where its name is taken, maybe by another user.
    """
    folder = Path(root or tempfile.gettempdir()) / f"mdt_ray-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        what = f"is a folder of user {found.st_uid}" if stat.S_ISDIR(found.st_mode) else "is none"
        raise PermissionError(f"{folder}: must be a folder of user {os.getuid()}, who runs this, and {what}, so that others "
                              "may change what lies in it; have it deleted, or set TMPDIR (for Ray's, RAY_TMPDIR) to a "
                              "folder of yours")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def new_path() -> Path:
    """A path at which nothing is yet. What killed processes left at theirs is deleted."""
    here, root = processes.where(), private_folder()
    space = sha256((here["host"] + here["space"]).encode()).hexdigest()[:8]
    for path in root.glob(f"{space}-*"):  # of hosts and containers that share it, each knows its own processes
        owner = path.name.split("-")[1]
        if owner.isdecimal() and processes.start_of(int(owner)) is None:
            discard(path)
    return root / f"{space}-{os.getpid()}-{uuid.uuid4().hex}"


def discard(path: Path) -> None:
    """Delete what lies at a local path, if anything does."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
