"""The four jobs over three hosts, submitted from outside, with a store that is reached over the network only."""

import json
import threading

import pytest

from tests.chaos.chaos import WORKERS, Chaos, rows_of
from tests.chaos.rig import Rig, wait

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NO_DRIVERS = (*WORKERS["precompute"], *WORKERS["evaluate"], "ray::RayTrainWorker")
"""Titles of processes that do the work of a job or of a trial themselves."""


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rig")
    with Rig(folder) as rig:
        yield Chaos(rig, folder)


def wait_for(rig: Rig, output: str, part: str) -> None:
    """Until an object with this in its name is in the store."""
    wait(lambda: any(part in name for name in rig.store.times(output)), part)


@pytest.mark.parametrize("job", ["precompute", "train", "tune", "evaluate"])
def test_a_job_runs_over_hosts_and_a_store(chaos, job):
    """In this order: a job begins with what those before it left in the store."""
    at_work: set[int] = set()
    on_head: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            at_work.update(k for k, host in enumerate(chaos.rig.hosts) if chaos.rig.find(*WORKERS[job], among=[host]))
            on_head.update(title for title in NO_DRIVERS if chaos.rig.find(title, among=chaos.rig.hosts[:1]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        chaos.straight(job)
    finally:
        over.set()
        thread.join()
    assert {1, 2} <= at_work, "both that have processors"
    assert on_head == set(), "which has none"
    left = chaos.rig.store.objects(f"straight/{job}")
    run = json.loads(left["run.json"])
    assert run["config"]["output"].startswith("s3://")
    assert {"precompute": "manifest.json", "train": "metrics.parquet", "tune": "results.json",
            "evaluate": "metrics.json"}[job] in left
    assert chaos.left_over(f"straight/{job}") == []


def test_training_goes_on_without_a_host_that_is_lost_for_good(chaos):
    """With another number of workers, whose sums have another order: losses are the same to 1e-5."""
    rig, output = chaos.rig, "without-a-host"
    process = rig.submit(*chaos.command("train", output), "--min-workers", "1")
    wait_for(rig, output, "checkpoints/step-00000010/checksums.json")
    rig.hosts[2].kill()
    code, text = chaos.finish("without-a-host", process)
    rig.start(rig.hosts[2])
    assert code == 0, text
    assert "going on with 1 of 2 workers" in text
    straight, ours = (rows_of(rig.store.objects(path)) for path in ("straight/train", output))
    assert [row["step"] for row in ours] == [row["step"] for row in straight]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in straight], rel=1e-5)
    assert ours[0]["loss"] == straight[0]["loss"], "until the host was lost"


@pytest.mark.parametrize("job", ["precompute", "train", "tune", "evaluate"])
def test_the_same_command_goes_on_when_the_head_was_lost(chaos, job):
    """And all of Ray with it, which knows of no job when it is there again."""
    rig, output = chaos.rig, f"without-a-head/{job}"
    process = rig.submit(*chaos.command(job, output))
    wait_for(rig, output, "chunk" if job in ("precompute", "evaluate") else "checkpoints/")
    rig.hosts[0].kill()
    code, text = chaos.finish(f"head-{job}", process)
    assert code != 0, text
    for host in rig.hosts:
        host.kill()
    rig.start_all()
    assert chaos.broken(job, output) == []
    code, text = chaos.finish(f"head-{job}", rig.submit(*chaos.command(job, output)))
    assert code == 0, text
    spent = {"spent.json differs"}  # of a sweep: its driver counts that
    assert set(chaos.differences(job, output)) <= spent
    assert chaos.left_over(output) == []
