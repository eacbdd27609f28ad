"""A real Slurm whose nodes are hosts on this machine: munge, a controller outside, a daemon on each node."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests import hosts
from tests.conftest import ROOT
from tests.hosts import Host

CONFIG = """\
ClusterName=test
SlurmctldHost={host}({net}.254)
SlurmUser=root
AuthType=auth/munge
# A job that goes into the queue again waits for as long as its old credentials hold, which is two minutes.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort=17002
SlurmdPort=17003
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
FirstJobId={first}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_here() -> bool:
    """Whether Slurm and munge are installed, and this process may make hosts."""
    return all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))) and hosts.namespaces_allowed()


class Slurm:
    """Two nodes of four CPUs, as they are told. Jobs start in `checkout`, which holds the code of this one."""

    def __init__(self, folder: Path):
        self.folder, self.checkout = folder, folder / "checkout"
        self.tag, self.net = f"{os.getpid() % 10000}", f"10.{77 + os.getpid() % 100}.1"
        self.bridge = f"s{self.tag}b"
        self.nodes = [self._node(number) for number in (1, 2)]
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "SLURM_CONF": f"{folder}/slurm.conf", "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0"}  # they share this machine's name, by which Gloo looks for a network
        self.first = 10000 + os.getpid() % 10000  # of jobs: Ray's folders are named by it

    def _node(self, number: int) -> Host:
        name = f"slurm{self.tag}n{number}"
        return Host(name, f"{self.net}.{number}", 4, ["nsenter", f"--net=/run/netns/{name}"], f"s{self.tag}v{number}")

    def __enter__(self) -> "Slurm":
        try:
            hosts.lay_cables(self.bridge, self.net, self.nodes)
            self.checkout.mkdir()
            for name in ("cluster", "mdt_ray", "pipelines", "tune_spaces"):
                (self.checkout / name).symlink_to(ROOT / name)
            (self.checkout / ".venv").symlink_to(sys.prefix)
            config = CONFIG.format(host=os.uname().nodename, net=self.net, folder=self.folder, first=self.first)
            for node in self.nodes:
                config += f"NodeName={node.name} NodeAddr={node.address} CPUs={node.cpus} RealMemory=8000\n"
                (self.folder / f"spool-{node.name}").mkdir()
            (self.folder / "state").mkdir()
            (self.folder / "slurm.conf").write_text(config)
            key = self.folder / "munge.key"
            key.write_bytes(os.urandom(1024))
            key.chmod(0o600)
            self._run("munged", "--force", f"--key-file={key}", *(
                f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("pid", "log", "seed")),
                f"--socket={self.folder}/munge.sock")
            self._run("slurmctld", "-f", f"{self.folder}/slurm.conf")
            for node in self.nodes:
                self.start(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            node.kill()
        for name in ("controller.pid", "munge.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.folder / name).read_text()), 9)
        hosts.take_up_cables(self.bridge, self.nodes)

    def _run(self, *command: str) -> str:
        with (self.folder / "slurm.log").open("a") as log:  # daemons hold what they are given open
            log.write(f"{command}\n")
            log.flush()
            if command[0] in ("sbatch", "scontrol", "scancel"):
                return subprocess.run(command, check=True, env=self.environment, cwd=self.checkout, text=True,
                                      stdout=subprocess.PIPE, stderr=log).stdout
            subprocess.run(command, check=True, env=self.environment, cwd=self.folder, stdout=log, stderr=log)
            return ""

    def start(self, node: Host) -> None:
        """Start its daemon (again)."""
        self._run(*node.prefix, "slurmd", "-N", node.name, "-f", f"{self.folder}/slurm.conf",
                  "-L", f"{self.folder}/{node.name}.log")

    def submit(self, *words: str) -> int:
        """`sbatch <words>`; returns the job's number."""
        return int(re.search(r"\d+", self._run("sbatch", *words))[0])

    def cancel(self, *words: str) -> None:
        self._run("scancel", *words)

    def log(self, job: int) -> str:
        path = self.checkout / f"mdt-ray-{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def facts(self, job: int) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode and more."""
        return dict(word.split("=", 1) for word in self._run("scontrol", "show", "job", str(job)).split() if "=" in word)

    def wait_for(self, job: int, moment, what: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not moment():
            assert time.monotonic() < end, f"{what} did not come: {self.facts(job)}\n{self.log(job)[-3000:]}"
            time.sleep(0.5)
