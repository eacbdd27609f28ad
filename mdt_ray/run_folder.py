"""An output folder and who may write to it: run.json (settings, identity, versions) and the lock of its one writer."""

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mdt_ray
from mdt_ray import config_io, processes, storage

logger = logging.getLogger(__name__)
LOCK = "lock.json"
LEASE_SECONDS = 30.0
"""A lock of another host counts as abandoned after this time without renewal, which who wants it waits for."""
LONG_AGO_SECONDS = 600.0
"""No two clocks differ by as much: a lock last renewed so long ago needs no waiting."""


class Claim(NamedTuple):
    """What the only writer of a folder, and of all below it, shows for it."""

    folder: str
    token: str


class TakenOver(RuntimeError):
    """Another run has the folder now: this one may not write there any more."""

    @classmethod
    def of(cls, folder: str) -> "TakenOver":
        return cls(f"{folder}: another run has taken over; this one stops")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, without importing any of it."""
    found = {"mdt_ray": mdt_ray.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "ray", "diffusers", "pyarrow", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    top = Path(mdt_ray.__file__).parents[1]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (top / ".git").exists():  # else it would tell of a project in which the package is installed
            found["git"] = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=top, check=True, text=True,
                                          capture_output=True).stdout.strip()
    return found


def describe(job: str, config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json. `inputs` names what the job reads by content (hashes), and is part of the identity."""
    identity = config_io.identity_fields(config) | {"inputs": inputs}
    return {"job": job, "config": config_io.to_dict(config), "identity": identity,
            "name": config_io.fingerprint({"job": job} | identity), "versions": versions()}


def check_identity(output: str, run: dict[str, Any]) -> None:
    """Raise ValueError, showing the difference, if `output` holds another run than `run`."""
    uri = storage.join(output, "run.json")
    if not storage.exists(uri):
        return
    held = storage.read_json(uri)
    if held.get("name") == run["name"]:
        return
    lines = config_io.difference(held.get("identity", {}), json.loads(json.dumps(run["identity"])))
    if held.get("job") != run["job"]:
        lines = [f"job: {held.get('job')!r} -> {run['job']!r}"]
    raise ValueError(f"{output} holds another run; these settings differ:\n  " + "\n  ".join(lines) +
                     "\nUse another output folder, the settings of the run there, or delete the folder.")


@contextlib.contextmanager
def claim(output: str, run: dict[str, Any], above: Claim | None = None) -> Iterator[Claim]:
    """Hold `output` as its only writer, with `run` written to its run.json and without what killed runs left half-written
    in it; yields what `holds` takes.

    above: a claim that covers `output` already, and is yielded then. (A trial that outlives a killed sweep must not stop the
    next sweep's.)
    Raises ValueError if the folder holds another identity or if another living process writes to it.
    """
    check_identity(output, run)
    with contextlib.nullcontext(above) if above else _lock(output) as held:
        record(output, run)
        yield held


def record(output: str, run: dict[str, Any]) -> None:
    """Write run.json, and delete what killed runs left half-written. For folders below one that is claimed already. Raises
    ValueError as check_identity."""
    check_identity(output, run)
    storage.clear_leftovers(output)
    storage.write_json(storage.join(output, "run.json"), run)


def is_locked(output: str) -> bool:
    """Whether a process writes to a folder, or was killed as it did."""
    return storage.exists(storage.join(output, LOCK))


def holds(claim: Claim) -> bool:
    """Whether a claim still stands. A worker that outlives its killed driver asks before it writes, and finds that another
    run has taken over."""
    try:
        return storage.read_json(storage.join(claim.folder, LOCK)).get("token") == claim.token
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _lock(output: str) -> Iterator[Claim]:
    """The lock file names a process (host, boot, namespace, pid and start); a thread renews it while the owner lives."""
    uri = storage.join(output, LOCK)
    owner = processes.where() | {"pid": os.getpid(), "started": processes.start_of(os.getpid()), "token": uuid.uuid4().hex}
    held = Claim(output, owner["token"])
    while not holds(held):  # (of two that find no lock at the same moment, the one that writes last has it)
        _refuse_living_owner(uri, output)
        storage.write_json(uri, owner | {"renewed": time.time()})
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LEASE_SECONDS / 3):
            with contextlib.suppress(OSError, ValueError):  # a store that fails for once is no reason to lose the folder
                if not holds(held):
                    return
                storage.write_json(uri, owner | {"renewed": time.time()})

    thread = threading.Thread(target=renew, daemon=True, name="lock-renewal")
    thread.start()
    try:
        yield held
    finally:
        done.set()
        thread.join()
        if holds(held):
            storage.remove(uri)


def _refuse_living_owner(uri: str, output: str) -> None:
    try:
        held = storage.read_json(uri)
    except FileNotFoundError:
        return
    is_near = held.items() >= processes.where().items()
    started = processes.start_of(held["pid"]) if is_near else processes.UNKNOWN
    alive = started == held["started"]
    if started == processes.UNKNOWN:
        alive = abs(time.time() - held["renewed"]) < LONG_AGO_SECONDS and _is_renewed(uri, held)
    if alive:
        raise ValueError(f"{output} is being written by process {held['pid']} on {held['host']}; wait for it, stop it, "
                         "or use another output folder")


def _is_renewed(uri: str, held: dict[str, Any]) -> bool:
    """Whether the owner of a lock renews it while this process looks on: the clocks of two hosts differ."""
    logger.info("%s has a lock of a process on %s; waiting up to %.0f s to see whether that lives", storage.parent(uri),
                held["host"], LEASE_SECONDS)
    end = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < end:
        time.sleep(LEASE_SECONDS / 30)
        try:
            if storage.read_json(uri) != held:
                return True
        except FileNotFoundError:
            return False
    return False
