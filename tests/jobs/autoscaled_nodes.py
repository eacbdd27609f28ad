"""Two trainings on a cluster whose autoscaler adds nodes as they are asked for, and takes away those that are idle.

The autoscaler is Ray's own; its nodes are processes on this machine. Run as a process of its own:
    python -m tests.jobs.autoscaled_nodes LATENTS OUTPUT
Prints one JSON line with what it saw.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import ray
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.clusters import free_port
from tests.jobs.preflight_nodes import wait
from tests.jobs.test_kills import TRAIN
from tests.jobs.train_nodes import STORE, Driver

IDLE_MINUTES = 0.1
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


def start(folder: Path) -> tuple[subprocess.Popen, str]:
    """A head of one CPU with an autoscaler that may add three nodes like it; the process that leads it, and its address."""
    port, client_port = free_port(), free_port()
    address = f"{get_node_ip_address()}:{port}"
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
             "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    config = folder / "autoscaler.yaml"
    config.write_text(json.dumps({
        "cluster_name": "here", "max_workers": 3, "upscaling_speed": 20, "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {"type": "external", "module": PROVIDER, "gcs_address": address, "launch_multiple": True,
                     "head_node_id": FAKE_HEAD_NODE_ID},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1, "object_store_memory": STORE}, "node_config": {}, "min_workers": 0,
                       "max_workers": 3}},
        "head_node_type": "ray.head.default", "auth": {}, "docker": {}, "file_mounts": {},
        "file_mounts_sync_continuously": False} | {name: [] for name in lists}))
    environment = os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    command = ["start", "--head", "--block", "--port", str(port), "--num-cpus", "1", "--object-store-memory", str(STORE),
               "--autoscaling-config", str(config), "--include-dashboard", "false", "--dashboard-agent-listen-port", "0",
               "--min-worker-port", "0", "--max-worker-port", "0", "--ray-client-server-port", str(client_port)]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen([sys.executable, "-c", "from ray.scripts.scripts import main; main()", *command],
                                env=environment, stdout=log, stderr=log, start_new_session=True)
    return head, address


def num_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def main(latents: str, output: str) -> dict:
    folder = Path(output)
    folder.mkdir()
    head, address = start(folder)
    drivers = []

    def train(name: str, num_workers: int) -> Driver:
        drivers.append(Driver(address, f"{output}/{name}", [
            "train", "--latents", latents, *TRAIN, "--num-steps", "1000000", "--workers.num-workers", str(num_workers)]))
        return drivers[-1]

    try:
        wait(lambda: "Ray runtime started" in (folder / "head.log").read_text())
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        seen = {"before": num_nodes()}
        first = train("first", 2)
        first.wait_for(lambda: first.step() >= 2)
        seen["first"] = num_nodes()
        second = train("second", 4)
        second.wait_for((folder / "second" / "lock.json").exists)
        time.sleep(20)  # it waits for room by now
        seen["told"] = second.says("step")
        first.process.send_signal(signal.SIGTERM)
        seen["code"] = first.process.wait(90)
        second.wait_for(lambda: second.step() >= 2)
        seen["second"] = num_nodes()
        second.process.kill()
        # Ray Train asks for its workers' nodes as well, through an actor of no job, which forgets that after three minutes.
        wait(lambda: num_nodes() == 1, 300)
        seen["after"] = num_nodes()
    finally:
        for driver in drivers:
            driver.process.kill()
        ray.shutdown()
        for process in psutil.Process(head.pid).children(recursive=True):
            process.kill()
        head.kill()
    return seen


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
