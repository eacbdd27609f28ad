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


def private_folder() -> Path:
    """A folder for temporary files that nobody else on this machine may look into, made where it is missing.

    Raises PermissionError where another user has taken its name.
    """
    folder = Path(tempfile.gettempdir()) / f"mdt_ray-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user, who could read and change what lies in it; have it "
                              "deleted, or set TMPDIR to a folder of your own")
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
