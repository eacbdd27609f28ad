"""A sweep on a cluster of two nodes on this machine, one of which is lost while both train.

Run as a process of its own (Ray holds one cluster a process):  python -m tests.jobs.tune_nodes LATENTS OUTPUT
Prints one JSON line with what it saw.
"""

import json
import sys
from pathlib import Path

from mdt_ray import checkpoints
from tests.jobs.train_nodes import Driver, two_nodes

STEPS, EVERY = 150, 25


def main(latents: str, output: str) -> dict:
    cluster, second = two_nodes()
    driver = Driver(cluster.address, output, [
        "tune", "digits", "--train.latents", latents, "--max-trials", "2", "--train.num-steps", str(STEPS),
        "--train.checkpoint-every-steps", str(EVERY), "--train.precision", "fp32", "--evaluate.num-samples", "40"])
    trainings = Path(output) / "trainings"
    try:
        driver.wait_for(lambda: trainings.is_dir() and len(steps := [
            checkpoints.newest_step(str(folder)) for folder in trainings.iterdir()]) == 2 and min(steps) >= EVERY)
        cluster.remove_node(second, allow_graceful=False)
        code = driver.process.wait(300)
    finally:
        driver.process.kill()
        cluster.shutdown()
    return {"code": code, "log": driver.log.read_text()}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
