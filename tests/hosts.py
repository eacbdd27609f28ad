"""Hosts on one machine, as far as programs can tell. With network namespaces (root on Linux) each has an address and a cable
of its own; without, they are told apart by a variable in their processes' environment."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

MARK = "MDT_TEST_HOST"
"""In the environment of all processes of a host without a cable."""


def namespaces_allowed() -> bool:
    """Whether this process may make network namespaces, and was not told (MDT_RIG_NAMESPACES=0) to do without."""
    if os.geteuid() != 0 or shutil.which("ip") is None or os.environ.get("MDT_RIG_NAMESPACES") == "0":
        return False
    name = f"mdt-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made


@dataclass
class Host:
    """A machine, as far as its processes can tell."""

    name: str
    address: str
    cpus: int
    prefix: list[str] = field(default_factory=list)
    """What runs a command on it."""
    cable: str = ""
    """Its end of the network outside, where it has one."""

    def processes(self) -> list[psutil.Process]:
        """All that run on it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if self._has(process):
                    found.append(process)
        return found

    def _has(self, process: psutil.Process) -> bool:
        if self.cable:
            return os.path.samefile(f"/proc/{process.pid}/ns/net", f"/run/netns/{self.name}")
        return process.environ().get(MARK) == self.name

    def kill(self) -> None:
        """As if its power failed."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(processes, timeout=5)

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """Without network while the block runs."""
        subprocess.run(["ip", "link", "set", self.cable, "down"], check=True)
        try:
            yield
        finally:
            subprocess.run(["ip", "link", "set", self.cable, "up"], check=True)


def lay_cables(bridge: str, net: str, hosts: list[Host]) -> None:
    """Connect hosts with this machine, which is `net`.254."""
    lines = [f"link add {bridge} type bridge", f"addr add {net}.254/24 dev {bridge}", f"link set {bridge} up"]
    for host in hosts:
        lines += [f"netns add {host.name}", f"link add {host.cable} type veth peer name eth0 netns {host.name}",
                  f"link set {host.cable} master {bridge}", f"link set {host.cable} up",
                  f"-n {host.name} addr add {host.address}/24 dev eth0", f"-n {host.name} link set lo up",
                  f"-n {host.name} link set eth0 up"]
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True)


def take_up_cables(bridge: str, hosts: list[Host]) -> None:
    """Leave no trace of them, nor of what was laid of them."""
    for line in [f"{what} {name}" for host in hosts for what, name in (("netns del", host.name), ("link del", host.cable))]:
        subprocess.run(["ip", *line.split()], stderr=subprocess.DEVNULL)
    subprocess.run(["ip", "link", "del", bridge], stderr=subprocess.DEVNULL)
