"""Several hosts on this machine, each with a Ray node, and a store that they reach over the network only.

With network namespaces (root on Linux) a host has an address and a cable of its own, which can be pulled; without, hosts
share this machine's address and are told apart by a variable in their processes' environment. Either way they are real nodes
of a real Ray behind a token, killed by real signals.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from mdt_ray import scratch
from tests import clusters, hosts, s3
from tests.clusters import free_port
from tests.conftest import ROOT
from tests.hosts import MARK, Host

STORE = 2**20 * 120


class Rig:
    """A head without CPUs, and workers; `submit` is what a laptop does."""

    def __init__(self, folder: Path, workers: int = 2, cpus: int = 2):
        self.folder, self.is_network = folder, hosts.namespaces_allowed()
        self.tag = f"{os.getpid() % 10000}"
        self.net = f"10.{77 + os.getpid() % 100}.0"
        self.hosts = [self._host(i, cpus if i else 0) for i in range(workers + 1)]
        self.store_host = self._host(workers + 1, 0)
        self.port, self.dashboard = (6379, 8265) if self.is_network else (free_port(), free_port())
        self.environment = clusters.environment(folder) | s3.KEYS | {
            # A node is given up after so many failed looks: a cable pulled for ten seconds is no lost node.
            "RAY_health_check_failure_threshold": "8", "RAY_health_check_period_ms": "2000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0"}  # looks for new logs twice a second, not always: three share cores
        self.token = Path(self.environment["RAY_AUTH_TOKEN_PATH"])
        self.sessions = tempfile.mkdtemp(prefix="rig-", dir="/tmp")  # sockets: short
        self.address = f"http://{self.hosts[0].address}:{self.dashboard}"
        self.stack = contextlib.ExitStack()
        self.store: s3.Line | None = None

    def _host(self, number: int, cpus: int) -> Host:
        name = f"mdt{self.tag}h{number}"
        if not self.is_network:
            return Host(name, "127.0.0.1", cpus)
        return Host(name, f"{self.net}.{number + 1}", cpus, ["ip", "netns", "exec", name], f"m{self.tag}v{number}")

    def __enter__(self) -> "Rig":
        try:
            if self.is_network:
                hosts.lay_cables(f"m{self.tag}b", self.net, [*self.hosts, self.store_host])
            self._start_store()
            self.start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        for host in [*self.hosts, self.store_host]:
            host.kill()
        if self.is_network:
            hosts.take_up_cables(f"m{self.tag}b", [*self.hosts, self.store_host])
        shutil.rmtree(self.sessions, ignore_errors=True)

    def _start_store(self) -> None:
        host, port = self.store_host, 9000 if self.is_network else free_port()
        self._spawn(host, [sys.executable, "-m", "moto.server", "-H", host.address, "-p", str(port)])
        wait(lambda: _answers(host.address, port), "the store")
        outside = f"{self.net}.254" if self.is_network else host.address
        self.store = self.stack.enter_context(s3.forwarded(s3.Store(f"http://{host.address}:{port}"), host=outside))

    def start_all(self) -> None:
        for count, host in enumerate(self.hosts, 1):  # one after the other: without cables, they share a session's folder
            self.start(host)
            wait(lambda count=count: self.num_nodes() >= count, f"{count} nodes")

    def start(self, host: Host) -> None:
        """Start its node of Ray (again)."""
        common = [f"--node-ip-address={host.address}", f"--num-cpus={host.cpus}", f"--object-store-memory={STORE}",
                  "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}"]
        command = [*clusters.RAY_HERE, "start", "--block", *common]
        if host is self.hosts[0]:
            command += ["--head", f"--port={self.port}", f"--dashboard-host={host.address}",
                        f"--dashboard-port={self.dashboard}", f"--temp-dir={self.sessions}"]
        else:
            command += [f"--address={self.hosts[0].address}:{self.port}"]
        if self.is_network:  # its disk is its own, for Ray's folder and ours: no host finds there what another has written
            for place, shared in {"ray": self.sessions, "scratch": str(scratch.private_folder())}.items():
                disk = self.folder / f"{host.name}-{place}"
                disk.mkdir(exist_ok=True)
                command = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(disk), shared, *command]
        self._spawn(host, command)
        if host is self.hosts[0]:
            wait(lambda: _answers(host.address, self.dashboard), "the dashboard")

    def _spawn(self, host: Host, command: list[str]) -> None:
        environment = self.environment | {MARK: host.name}
        if self.is_network:
            environment |= {"GLOO_SOCKET_IFNAME": "eth0"}
        with (self.folder / f"{host.name}.log").open("ab") as log:
            subprocess.Popen([*host.prefix, *command], env=environment, cwd=self.folder, stdout=log, stderr=log,
                             start_new_session=True)

    def listed(self, what: str) -> list[dict]:
        """`nodes` or `placement_groups`, as the dashboard lists them."""
        request = urllib.request.Request(f"{self.address}/api/v0/{what}?limit=10000",
                                         headers={"Authorization": f"Bearer {self.token.read_text()}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]["result"]["result"]

    def num_nodes(self) -> int:
        """Living ones."""
        with contextlib.suppress(OSError):
            return sum(node["state"] == "ALIVE" for node in self.listed("nodes"))
        return 0

    def submit(self, *words: str) -> subprocess.Popen:
        """`mdt-ray submit <words>` from outside, with both streams in one."""
        command = [sys.executable, "-m", "mdt_ray.cli", "submit", "--address", self.address, *words]
        return subprocess.Popen(command, env=self.environment, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)

    def find(self, *parts: str, among: list[Host] | None = None) -> list[psutil.Process]:
        """Processes of all hosts, or some, whose command line holds one of `parts`, by age; no shells that wait for them."""
        found = []
        for process in (process for host in among or self.hosts for process in host.processes()):
            with contextlib.suppress(psutil.Error):
                if any(part in " ".join(process.cmdline()) for part in parts) and process.name() != "sh":
                    found.append((process.create_time(), process.pid, process))
        return [process for *_, process in sorted(found)]

    @contextlib.contextmanager
    def store_hung(self) -> Iterator[None]:
        """The store takes connections and does not answer while the block runs."""
        processes = self.store_host.processes()
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                process.send_signal(signal.SIGCONT)


def _answers(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def wait(moment, what: str, seconds: float = 120) -> None:
    """Until moment() is true, which is asked some times a second.

    Raises:
        AssertionError: It did not come within these seconds.
    """
    end = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < end, f"{what} did not come up"
        time.sleep(0.3)
