"""A Ray head in processes of its own, behind token authentication, for tests of what is submitted to it."""

import contextlib
import importlib.metadata
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement

from tests.harness import RAY

RAY_HERE = ("python", "-m", "ray.scripts.scripts")
"""`ray` of the first Python on the path."""


class Head(NamedTuple):
    """What a laptop needs to submit to it."""

    address: str
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bare_python(folder: Path) -> Path:
    """A Python with what the package needs, but for the package: as in the images of a cluster. What is beside that here
    would be found by diffusers, say, and loaded."""
    made = folder / "python"
    venv.create(made, symlinks=True)
    site, here = (Path(sysconfig.get_path("purelib", vars={"base": str(base)})) for base in (made, sys.prefix))
    for name in {file.parts[0] for needed in _needs("mdt-ray") for file in needed.files or ()} - {"..", "__pycache__"}:
        (site / name).symlink_to(here / name)
    return made / "bin" / "python"


def _needs(package: str) -> list[importlib.metadata.Distribution]:
    """The distributions that a package needs, and what they need; without itself."""
    found: dict[tuple[str, str], importlib.metadata.Distribution] = {}
    requirements = [Requirement(package)]
    while requirements:
        needed = requirements.pop()
        for extra in {"", *needed.extras}:
            if (needed.name.lower(), extra) not in found:
                found[needed.name.lower(), extra] = distribution = importlib.metadata.distribution(needed.name)
                below = map(Requirement, distribution.requires or ())
                requirements += [r for r in below if r.marker is None or r.marker.evaluate({"extra": extra})]
    return [distribution for (name, _), distribution in found.items() if name != package]


def environment(folder: Path) -> dict[str, str]:
    """For all who talk to a Ray with a token of its own, a file in `folder`; jobs there run a `python` that does not know
    the package: what they use of it was uploaded."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    path = f"{bare_python(folder).parent}:{RAY.parent}:{os.environ['PATH']}"
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"} | {
        "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0"}


@contextlib.contextmanager
def head(folder: Path, num_cpus: int = 3, agent_port: int = 0, **variables: str) -> Iterator[Head]:
    """Start one, and end all its processes. `variables` are set in its processes, not in the laptop's environment."""
    outside = environment(folder)
    port, agent_port = free_port(), agent_port or free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as sessions:  # sockets: short
        process = subprocess.Popen(
            [*RAY_HERE, "start", "--head", "--block", f"--port={free_port()}", "--dashboard-host=127.0.0.1",
             f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent_port}", f"--num-cpus={num_cpus}",
             "--object-store-memory=200000000", f"--temp-dir={sessions}", "--disable-usage-stats"],
            env=outside | variables, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True)
        try:
            _wait_for(port, process)
            yield Head(f"http://127.0.0.1:{port}", outside)
        finally:
            started = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            for left in psutil.wait_procs(started, timeout=5)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        assert process.poll() is None, process.stdout.read()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise AssertionError("the head's dashboard did not start")
