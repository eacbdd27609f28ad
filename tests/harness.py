"""Kill a chosen process of a real run at a chosen moment, run the same command again, and compare what is left.

Runs are command lines in processes of their own on the session's Ray; nothing is mocked.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from mdt_ray import cli

RAY = Path(sys.executable).parent / "ray"


def attempt(arguments: list[str], environment: dict[str, str], timeout: float = 240) -> subprocess.CompletedProcess:
    """`mdt-ray <arguments>` to its end, whatever that is."""
    return subprocess.run([sys.executable, "-m", "mdt_ray.cli", *arguments], env=environment, capture_output=True, text=True,
                          timeout=timeout)


def run(arguments: list[str], environment: dict[str, str], timeout: float = 240) -> subprocess.CompletedProcess:
    """The same; raises AssertionError with its output unless it exits with 0."""
    done = attempt(arguments, environment, timeout)
    assert done.returncode == 0, f"mdt-ray {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def run_here(arguments: list[str]) -> str:
    """The same in this process, for undisturbed runs: saves the seconds that imports take. Returns the last line."""
    job, *rest = arguments
    return cli.run(job, cli.parse(job, rest).settings)


def wait_until(moment: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait for a moment in a process's life; raises AssertionError where it ends, or time runs out, before."""
    end = time.monotonic() + seconds
    while not moment():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def run_and_kill(arguments: list[str], environment: dict[str, str], when: Callable[[], bool],
                 victim: str = "driver", timeout: float = 120) -> int:
    """Start `mdt-ray <arguments>`, SIGKILL the victim as soon as `when()` holds, and return the run's exit code.

    victim: `driver`, or a part of the command line of one of Ray's processes, such as `MapWorker`.
    Raises AssertionError if the run ends, or time runs out, before the moment comes.
    """
    process = subprocess.Popen([sys.executable, "-m", "mdt_ray.cli", *arguments], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + timeout
    try:
        while not when():
            assert process.poll() is None, f"the run ended before it could be killed:\n{process.stdout.read()}"
            assert time.monotonic() < end, "the moment to kill did not come"
            time.sleep(0.02)
        if victim == "driver":
            process.kill()
        else:
            while not (pid := ray_process(victim)):
                assert process.poll() is None, f"no process of Ray was called {victim!r}"
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
        text, _ = process.communicate(timeout=timeout)
        print(text[-3000:])  # shown where a test fails
        return process.returncode
    finally:
        process.kill()
        process.wait()


def ray_processes(part: str) -> list[int]:
    """Process ids of the workers of this session's Ray whose title holds `part` now."""
    found = []
    for process in psutil.Process().children(recursive=True):  # another Ray on this machine is somebody's work
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and part in title:
                found.append(process.pid)
    return found


def ray_process(part: str) -> int | None:
    """One of them, if there is one."""
    return next(iter(ray_processes(part)), None)


def open_placement_groups() -> list[str]:
    """Names or ids of what this session's Ray still holds resources for, once it had a moment to let go."""
    from ray.util import placement_group_table

    end = time.monotonic() + 20
    while held := [entry["name"] or key for key, entry in placement_group_table().items() if entry["state"] != "REMOVED"]:
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return held


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    """Content of the files that match, by path below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Temporary files and locks that nobody should find after a run."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if ".tmp-" in p.name or p.name == "lock.json"]
