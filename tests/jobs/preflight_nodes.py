"""The preflight on several nodes of this machine: a head without CPUs, one that claims a GPU, one with a disk of its own,
one with another package.

Run as a process of its own (Ray holds one cluster a process):  python -m tests.jobs.preflight_nodes FOLDER
Prints one JSON line: what each check raised and logged, and the nodes' ids.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from mdt_ray.config import WorkersConfig
from tests.conftest import ROOT
from tests.helpers import make_latents, tiny_training

STORE = 80 * 2**20


def wait(moment, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def wait_for_nodes(count: int) -> set[str]:
    """The ids of the nodes that may hold a worker, once there are so many."""
    from mdt_ray.jobs import preflight

    wait(lambda: len(preflight.worker_nodes(WorkersConfig())) == count)
    return {node["NodeID"] for node in preflight.worker_nodes(WorkersConfig())}


def start_node(address: str, hidden: Path | None, *files: str) -> subprocess.Popen:
    """A node in a mount namespace, where a file system that is empty, or holds empty files, covers `hidden`."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", address, "--num-cpus", "1",
               "--object-store-memory", str(STORE), "--disable-usage-stats", "--block"]
    if hidden:
        make = " ".join(["touch", str(hidden), *(str(hidden / file) for file in files)])
        command = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs none {hidden} && {make} && exec "$@"', "sh", *command]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_all(process: subprocess.Popen) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.wait()


def checking() -> int:
    """How many processes of Ray are in the check now."""
    titles = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return sum(title.startswith("ray::examine") for title in titles)


def main(folder: str) -> dict:
    import ray
    from ray.cluster_utils import Cluster

    from mdt_ray.jobs import preflight

    root = Path(folder)
    manifest = make_latents(root / "latents")
    (root / "out").mkdir()
    may_mount = subprocess.run(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL).returncode == 0
    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False,
        "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 3}})  # sees a death sooner
    gpu = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE)
    started = [start_node(cluster.address, root / "out" if may_mount else None)]
    try:
        os.environ["RAY_ADDRESS"] = cluster.address  # a cluster, which may grow
        ray.init(address=cluster.address, log_to_driver=False)
        apart = wait_for_nodes(2) - {gpu.node_id}
        bare = set()
        if may_mount:
            # Only now: of two that start at the same time on one machine, one may hang.
            started.append(start_node(cluster.address, ROOT / "mdt_ray", "__init__.py", "jobs.py"))
            bare = wait_for_nodes(3) - {gpu.node_id} - apart
        seen = {"may_mount": may_mount, "gpu": gpu.node_id[:12], "apart": min(apart)[:12],
                "bare": min(bare, default="")[:12]}

        def check(scenario: str, **workers) -> None:
            records: list[str] = []
            handler = logging.Handler()
            handler.emit = lambda record: records.append(f"{record.levelname} {record.getMessage()}")
            logging.getLogger("mdt_ray").addHandler(handler)
            error = ""
            try:
                config = tiny_training(root / "latents", root / "out", workers=WorkersConfig(**workers))
                preflight.check_nodes(config, manifest)
            except ValueError as refusal:
                error = str(refusal)
            logging.getLogger("mdt_ray").removeHandler(handler)
            seen[scenario] = {"error": error, "log": records, "left": sorted(p.name for p in (root / "out").iterdir())}

        logging.getLogger("mdt_ray").setLevel(logging.INFO)
        check("apart and bare", num_workers=4)
        for process in started[1:]:
            kill_all(process)
        wait_for_nodes(2)

        path = root / "latents" / manifest.files[0].name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)  # who opens it waits for a writer
        thread = threading.Thread(target=check, args=("lost",))
        thread.start()
        wait(lambda: checking() == 2)
        kill_all(started[0])
        wait_for_nodes(1)
        path.open("wb").close()
        thread.join()
        path.unlink()
        path.write_bytes(content)

        check("fine")
        path.unlink()
        check("no GPU", gpus_per_worker=1)
    finally:
        for process in started:
            kill_all(process)
        ray.shutdown()
        cluster.shutdown()
    return seen


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
