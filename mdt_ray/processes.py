"""Who a process is to others that may look for it later: a pid means nothing in another container, nor after its process.

Starts none and ends none.
"""

import contextlib
import os
import socket
from pathlib import Path

UNKNOWN = "unknown"
"""When a process started that is there: systems without /proc, or where it hides what others run."""


def where() -> dict[str, str]:
    """Where this process's pid means something: containers may have one host name, and each a pid 7 of its own."""
    found = {"host": socket.gethostname(), "boot": "", "space": ""}
    with contextlib.suppress(OSError):  # systems without /proc
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["space"] = os.readlink("/proc/self/ns/pid")
    return found


def start_of(pid: int) -> str | None:
    """The kernel's start time of a process (tells a reused pid apart); None if there is no such process, or a dead one that
    nobody has reaped."""
    with contextlib.suppress(OSError):
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else facts[18]
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # the latter of a number that is nobody's
        return None
    except PermissionError:  # another user's
        pass
    return UNKNOWN
