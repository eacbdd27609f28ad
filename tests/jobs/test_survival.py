"""Training that is stopped, hangs, or loses nodes: real processes, real signals, nothing lost."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mdt_ray import checkpoints
from tests import harness
from tests.conftest import ROOT
from tests.helpers import make_latents
from tests.jobs.test_kills import TRAIN
from tests.training.test_training import without_times

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("survival")
    make_latents(folder / "latents", num_images=200)
    return folder


def command(folder, name: str, *more: str) -> list[str]:
    return ["train", "--latents", f"{folder}/latents", "--output", f"{folder}/{name}", *TRAIN, *more]


def rows(folder, name: str) -> list[dict]:
    return checkpoints.read_metrics(str(folder / name / "metrics.parquet"))


def start(arguments: list[str], own_ray: bool = False) -> subprocess.Popen:
    from mdt_ray.jobs import session

    environment = session.environment()
    if own_ray:
        del environment["RAY_ADDRESS"]
    return subprocess.Popen([sys.executable, "-m", "mdt_ray.cli", *arguments], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=own_ray)


def read_until(part: str, process: subprocess.Popen) -> None:
    said = []
    while not said or part not in said[-1]:
        said.append(process.stdout.readline())
        assert said[-1], said


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_in_a_checkpoint_and_the_command_that_goes_on(folder, number):
    name = f"stopped-{number}"
    process = start(command(folder, name, "--num-steps", "100000", "--checkpoint-every-steps", "30"))
    harness.wait_until(lambda: checkpoints.newest_step(str(folder / name)) >= 60, process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, text
    step = int(re.search(r"stopped; the newest checkpoint is that of step (\d+); this goes on:", text)[1])
    assert f"mdt-ray train --latents {folder}/latents --output {folder}/{name}" in text.splitlines()[-1]
    assert checkpoints.latest(str(folder / name)).endswith(f"{step}")
    assert [row["step"] for row in rows(folder, name)] == list(range(1, step + 1))
    assert harness.leftovers(folder / name) == []
    if number == signal.SIGTERM:  # that it goes on bit for bit is shown once
        return
    harness.run_here(command(folder, name, "--num-steps", str(step + 10), "--checkpoint-every-steps", "30"))
    harness.run_here(command(folder, "straight", "--num-steps", str(step + 10), "--checkpoint-every-steps", "1000"))
    assert without_times(rows(folder, name)) == without_times(rows(folder, "straight"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_a_job_without_checkpoints_with_its_number(folder, number):
    """By which a batch system knows what to put into its queue again."""
    output = folder / f"latents-{number}"
    process = start(["precompute", "digits", "--output", str(output), "--chunk-size", "15", "--workers.num-workers", "1"])
    harness.wait_until(lambda: any(output.glob("chunks/*.json")), process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, text
    assert text.splitlines()[-1] == "mdt-ray precompute: stopped; the same command goes on"
    assert not (output / "manifest.json").exists()
    assert harness.leftovers(output) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", [0, 1, 2, 3])
def test_a_signal_while_ray_starts_leaves_nothing_behind(folder, seconds, number):
    """A Ray of the run's own, which sets a handler of its own in the middle of its start. A terminal's Ctrl-C also reaches
    the processes that it is starting."""
    name = f"early-{number}-{seconds}"
    process = start(command(folder, name), own_ray=True)
    read_until("starting Ray", process)
    time.sleep(seconds)
    children = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, text
    assert "stopped before the first checkpoint; this goes on:" in text
    assert set(os.listdir(folder / name)) <= {"run.json", "tensorboard"}
    assert psutil.wait_procs(children, timeout=90)[1] == [], "Ray's agents take their time"


@pytest.mark.slow
def test_a_signal_while_there_is_no_room_leaves_nothing_behind(folder):
    process = start(command(folder, "no-room", "--workers.num-workers", "8", "--workers.cpus-per-worker", "99"))
    read_until("waiting for more nodes", process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "stopped before the first checkpoint; this goes on:" in text
    assert set(os.listdir(folder / "no-room")) <= {"run.json", "tensorboard"}


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_a_worker_that_cannot_write(folder):
    process = start(command(folder, "impatient", "--num-steps", "100000", "--checkpoint-every-steps", "10"))
    harness.wait_until(lambda: checkpoints.newest_step(str(folder / "impatient")) >= 20, process)
    worker = harness.ray_process("RayTrainWorker")
    os.kill(worker, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, text
    assert "mdt-ray train: stopped; the same command goes on" in text
    assert not psutil.pid_exists(worker)
    assert "lock.json" not in os.listdir(folder / "impatient")


@pytest.mark.slow
def test_a_worker_that_hangs_is_noticed_and_all_go_on(folder):
    """One of two workers is stopped (SIGSTOP); the other waits in a collective call, says so, and both are replaced."""
    name = "hang"
    process = start(command(folder, name, "--num-steps", "400", "--checkpoint-every-steps", "10", "--hang-timeout-s", "15",
                            "--workers.num-workers", "2"))
    harness.wait_until(lambda: checkpoints.newest_step(str(folder / name)) >= 20, process)
    stopped = harness.ray_process("RayTrainWorker")
    os.kill(stopped, signal.SIGSTOP)
    text, _ = process.communicate(timeout=180)
    assert process.returncode == 0, text
    stacks = list((folder / name / "stacks").glob("*.txt"))
    assert len(stacks) >= 1
    # Of gradients or of buffers, in the backward pass, or the question whether to stop.
    assert any(words in stacks[0].read_text() for words in ("all_reduce", "backward", "nn/parallel/distributed.py"))
    assert "where it hung, by rank: " in text
    assert "going on from the checkpoint of step" in text
    assert not psutil.pid_exists(stopped)
    assert [row["step"] for row in rows(folder, name)] == list(range(1, 401))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["loss", "preemption"])
def test_nodes_that_go_and_come(folder, scenario):
    """Two nodes of one worker each. Lost: goes on with one, and with two once there is another node. Told to go: a
    checkpoint just in time (there is no other), and on with one."""
    outside = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-m", "tests.jobs.train_nodes", scenario, f"{folder}/latents",
                           f"{folder}/{scenario}"], env=outside, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["code"] == 128 + signal.SIGTERM
    found = rows(folder, scenario)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    counts = [row["num_workers"] for row in found]
    changes = [counts[0]] + [b for a, b in itertools.pairwise(counts) if a != b]
    assert changes == ([2, 1, 2] if scenario == "loss" else [2, 1])
    if scenario == "preemption":
        step = int(re.search(r"a node is about to go: starting the workers again from step (\d+)", seen["log"])[1])
        assert counts.index(1) == step, "no step was done twice"
    harness.run_here(command(folder, f"{scenario}-straight", "--num-steps", "40"))
    for one, two in zip(without_times(rows(folder, f"{scenario}-straight")), found, strict=False):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.slow
def test_nodes_are_asked_for_while_a_training_waits_and_no_longer(folder):
    """The end of one job does not take back what another asked for, and a killed driver asks for nothing."""
    outside = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-m", "tests.jobs.autoscaled_nodes", f"{folder}/latents", f"{folder}/autoscaled"],
                          env=outside, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "before": 1, "first": 2, "told": False, "code": 128 + signal.SIGTERM, "second": 4, "after": 1}
