"""cluster/slurm/run.sbatch under a real Slurm of two nodes. The script's branches, one by one: test_cluster_files.py."""

import json

import pytest

from mdt_ray import checkpoints
from tests import slurm
from tests.helpers import make_latents
from tests.jobs.test_kills import TRAIN

NEEDED = "needs root, and of apt slurmctld, slurmd, slurm-client and munge"
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(not slurm.is_here(), reason=NEEDED)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    make_latents(folder / "latents", num_images=200)
    with slurm.Slurm(folder) as cluster:
        yield cluster


def submit(cluster, name: str, *options: str) -> int:
    """A training of a worker on each node, which ends when it is stopped."""
    return cluster.submit(
        "--nodes=2", "--cpus-per-task=2", *options, "cluster/slurm/run.sbatch", "python", "pipelines/train.py",
        "--latents", f"{cluster.folder}/latents", "--output", f"{cluster.folder}/{name}", *TRAIN, "--num-steps", "1000000",
        "--checkpoint-every-steps", "50", "--workers.num-workers", "2", "--workers.cpus-per-worker", "2")


def newest(cluster, name: str) -> int:
    return checkpoints.newest_step(f"{cluster.folder}/{name}")


def stop(cluster, job: int) -> None:
    """As the page says: with a checkpoint, and for good."""
    cluster.cancel("--batch", "--signal=TERM", str(job))
    cluster.wait_for(job, lambda: cluster.facts(job)["JobState"] == "FAILED", "its end")
    assert cluster.facts(job)["ExitCode"] == "143:0"
    for node in cluster.nodes:
        cluster.wait_for(job, lambda node=node: [p.name() for p in node.processes()] == ["slurmd"], "an idle node")


def test_a_job_out_of_time_saves_and_goes_on_in_the_queue(cluster):
    job = submit(cluster, "timed", "--time=3", "--signal=B:USR1@90")
    cluster.wait_for(job, lambda: newest(cluster, "timed"), "a checkpoint")
    assert all(any("RayTrainWorker" in " ".join(p.cmdline()) for p in node.processes()) for node in cluster.nodes)
    cluster.wait_for(job, lambda: cluster.facts(job)["Restarts"] == "1", "the second try")
    saved = newest(cluster, "timed")
    assert f"stopped; the newest checkpoint is that of step {saved}" in cluster.log(job)
    cluster.wait_for(job, lambda: newest(cluster, "timed") > saved, "another checkpoint")
    assert f"going on from the checkpoint of step {saved}" in cluster.log(job)
    stop(cluster, job)


def test_a_job_that_loses_a_node_goes_on_in_the_queue(cluster):
    job = submit(cluster, "lost")
    cluster.wait_for(job, lambda: newest(cluster, "lost"), "a checkpoint")
    cluster.nodes[1].kill()
    cluster.wait_for(job, lambda: cluster.facts(job)["JobState"] == "PENDING", "its return into the queue")
    saved = newest(cluster, "lost")
    cluster.start(cluster.nodes[1])
    cluster.wait_for(job, lambda: newest(cluster, "lost") > saved, "another checkpoint")
    assert "going on from the checkpoint of step" in cluster.log(job)
    stop(cluster, job)


def test_a_job_that_loses_a_node_of_ray_goes_on_in_the_queue(cluster):
    """Of which Slurm knows nothing: a worker's daemon of Ray ends alone."""
    job = submit(cluster, "alone")
    cluster.wait_for(job, lambda: newest(cluster, "alone"), "a checkpoint")
    next(p for p in cluster.nodes[1].processes() if p.name() == "raylet").kill()
    cluster.wait_for(job, lambda: cluster.facts(job)["Restarts"] == "1", "the second try")
    saved = newest(cluster, "alone")
    assert "a node of Ray has ended" in cluster.log(job)
    cluster.wait_for(job, lambda: newest(cluster, "alone") > saved, "another checkpoint")
    assert f"going on from the checkpoint of step {saved}" in cluster.log(job)
    stop(cluster, job)


def test_the_line_of_the_page_goes_from_pictures_to_an_fid(cluster):
    """On one node of four processors. The log ends with the numbers."""
    output = cluster.folder / "digits"
    job = cluster.submit("--cpus-per-task=4", "cluster/slurm/run.sbatch", "python", "pipelines/all.py", "digits",
                         "--output", str(output))
    cluster.wait_for(job, lambda: cluster.facts(job)["JobState"] in ("COMPLETED", "FAILED"), "its end", 900)
    assert cluster.facts(job)["ExitCode"] == "0:0"
    fid = json.loads((output / "evaluate" / "guided" / "metrics.json").read_text())["metrics"]["fid_digits_1k"]
    *_, numbers, report = cluster.log(job).splitlines()
    assert numbers.startswith(f"fid_digits_1k {fid:.4g}  ")
    assert report == f"report {output}/report/index.html"
