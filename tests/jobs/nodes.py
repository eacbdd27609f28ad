"""A cluster of several nodes on this machine, each with its own raylet: encoders on one, decoders on another that is lost.

Run as a process of its own (Ray holds one cluster a process):  python -m tests.jobs.nodes SOURCE OUTPUT
Prints one JSON line with what it saw.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

from tests.clusters import free_port
from tests.jobs.test_precompute import encoding


def main(source: str, output: str) -> dict:
    from mdt_ray.jobs import session

    for name, value in session.QUIET.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.state import list_actors, list_tasks

    store = 150 * 2**20
    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 1, "object_store_memory": store, "include_dashboard": True, "dashboard_port": free_port()})
    os.environ["RAY_ADDRESS"] = cluster.address  # a cluster, which may grow
    ray.init(log_to_driver=False)
    head = ray.get_runtime_context().get_node_id()
    chunks = Path(output) / "chunks"
    failure: list[BaseException] = []

    def job() -> None:
        from mdt_ray.jobs.precompute import precompute

        try:
            precompute(encoding(source, output, chunk_size=15, encode_batch_size=8, decoders_per_worker=2))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=job)
    thread.start()

    def wait(moment) -> None:
        end = time.monotonic() + 120  # add_node belongs to the main thread, the job to another
        while not moment():
            if failure:
                raise failure[0]
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.05)

    wait(lambda: any("MapWorker" in a.class_name for a in list_actors(filters=[("state", "=", "ALIVE")])))
    decoders = cluster.add_node(num_cpus=2, object_store_memory=store)
    wait(lambda: len(list(chunks.glob("*.json"))) >= 3)
    cluster.remove_node(decoders, allow_graceful=False)
    at_loss = len(list(chunks.glob("*.json")))
    time.sleep(3)
    cluster.add_node(num_cpus=2, object_store_memory=store)
    thread.join(180)
    if failure:
        raise failure[0]
    assert not thread.is_alive(), "the job did not end"
    tasks = list_tasks(filters=[("name", "=", "decode_piece"), ("state", "=", "FINISHED")], limit=1000)
    nodes = {task.node_id for task in tasks}
    ray.shutdown()
    cluster.shutdown()
    return {"chunks_at_loss": at_loss, "decoded_on_head": head in nodes, "decoder_nodes": len(nodes), "tasks": len(tasks)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
