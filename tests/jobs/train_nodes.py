"""Training on a cluster of several nodes on this machine, one of which is lost and replaced, or told to go.

Run as a process of its own (Ray holds one cluster a process):  python -m tests.jobs.train_nodes SCENARIO LATENTS OUTPUT
The driver is a process too, stopped at the end by SIGTERM. Prints one JSON line with what it saw.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.clusters import free_port
from tests.jobs.test_kills import TRAIN

STORE = 150 * 2**20


class Driver:
    """`mdt-ray <arguments>` in a process of its own, and what it says."""

    def __init__(self, address: str, output: str, arguments: list[str]):
        self.log = Path(f"{output}.log")
        command = [sys.executable, "-m", "mdt_ray.cli", *arguments, "--output", output]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, stdout=file, stderr=file)

    def wait_for(self, moment: Callable[[], bool], seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not moment():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"it did not come to that:\n{self.log.read_text()}"
            time.sleep(0.1)

    def says(self, text: str) -> bool:
        return text in self.log.read_text()

    def step(self) -> int:
        """The last step on its bar, which moves every few seconds."""
        return max(map(int, re.findall(r"step (\d+)/", self.log.read_text())), default=0)

    def go_on(self) -> None:
        """Until it has made steps since now."""
        before = self.step()
        self.wait_for(lambda: self.step() > before)


def two_nodes() -> tuple[Any, Any]:
    """A cluster of two nodes of one CPU, and the second of them."""
    from mdt_ray.jobs import session

    for name, value in session.QUIET.items():
        os.environ.setdefault(name, value)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 1, "object_store_memory": STORE, "include_dashboard": True, "dashboard_port": free_port()})
    return cluster, cluster.add_node(num_cpus=1, object_store_memory=STORE)


def main(scenario: str, latents: str, output: str) -> dict:
    cluster, second = two_nodes()
    every = 20 if scenario == "loss" else 10_000_000
    driver = Driver(cluster.address, output, ["train", "--latents", latents, *TRAIN, "--num-steps", "1000000",
                                              "--checkpoint-every-steps", str(every), "--workers.num-workers", "2",
                                              "--min-workers", "1"])
    try:
        driver.wait_for(lambda: driver.step() >= 20)
        if scenario == "loss":
            cluster.remove_node(second, allow_graceful=False)
            driver.wait_for(lambda: driver.says("going on with 1 of 2 workers"))
            driver.go_on()
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
            driver.wait_for(lambda: driver.says("there is room for more workers: starting"))
        else:
            drain(cluster.address, second.node_id)
            driver.wait_for(lambda: driver.says("a node is about to go: starting"))
            driver.wait_for(lambda: driver.says("going on with 1 of 2 workers"))
        driver.go_on()
        driver.process.send_signal(signal.SIGTERM)
        code = driver.process.wait(120)
    finally:
        driver.process.kill()
        cluster.shutdown()
    return {"code": code, "log": driver.log.read_text()}


def drain(address: str, node: str) -> None:
    """The notice that a spot instance's node gets: it will be gone in a minute."""
    subprocess.run([sys.executable, "-c", "from ray.scripts.scripts import main; main()", "drain-node", "--address", address,
                    "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test",
                    "--deadline-remaining-seconds", "60"], check=True, capture_output=True)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
