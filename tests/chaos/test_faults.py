"""Faults that are no kill: a full disk, want of memory, a full object store, two drivers at once, damaged files, a slow
store.

After each the same command ends with the artefacts of an undisturbed run, or with one error that says what to do.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mdt_ray import checkpoints, storage
from tests import clusters, harness, s3
from tests.chaos.chaos import essence
from tests.jobs.test_kills import TRAIN

pytestmark = [pytest.mark.ray, pytest.mark.slow]
JOBS = ("precompute", "train", "evaluate", "tune")
THREADS = {"OMP_NUM_THREADS": "1"}
"""Of all drivers: the last bit of a metric depends on their number."""


@pytest.fixture(scope="module")
def environment(ray_session):
    from mdt_ray.jobs import session

    return session.environment() | THREADS


@pytest.fixture(scope="module")
def straight(tmp_path_factory, environment) -> Path:
    """The undisturbed runs, a folder a job."""
    folder = tmp_path_factory.mktemp("straight")
    for job in JOBS:
        harness.run(command(job, folder / job, folder), environment)
    return folder


def command(job: str, output: Path | str, straight: Path) -> list[str]:
    """A short run of a job on the digits."""
    words = {
        "precompute": ["--chunk-size", "100"],
        "train": ["--latents", f"{straight}/precompute", *TRAIN, "--num-steps", "30", "--checkpoint-every-steps", "10",
                  "--workers.num-workers", "2"],
        "evaluate": ["--checkpoint", f"{straight}/train", "--num-samples", "120", "--chunk-size", "20"],
        "tune": ["--train.latents", f"{straight}/precompute", "--train.num-steps", "15", "--train.checkpoint-every-steps",
                 "5", "--evaluate.num-samples", "50", "--max-trials", "2"],
    }[job]
    one = ["--workers.num-workers", "1"] if job in ("precompute", "evaluate") else []
    return [job, "digits", "--output", str(output), *words, *one]


def last_line(done: subprocess.CompletedProcess) -> str:
    return done.stderr.strip().splitlines()[-1]


def same(job: str, folder: Path, straight: Path) -> list[str]:
    """Names of what differs from the undisturbed run, or should not be there."""
    ours, theirs = (essence(job, harness.files(path, "**/*"), 30) for path in (folder, straight / job))
    assert theirs
    return [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)] + harness.leftovers(folder)


# A full disk


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`, which is as full as one gets."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize(("job", "size"), [("precompute", "256k"), ("train", "1200k"), ("evaluate", "300k"),
                                           ("tune", "2m")])
def test_on_a_full_disk_a_job_says_so_and_goes_on_when_there_is_room(straight, tmp_path, environment, job, size):
    folder = tmp_path / "disk"
    with disk(folder, size):
        done = harness.attempt(command(job, folder / "out", straight), environment)
        assert done.returncode == 1, done.stderr[-2000:]
        assert "No space left on device" in last_line(done)
        assert "make room" in last_line(done)
        assert str(folder / "out") in last_line(done)
        assert harness.leftovers(folder) == []
        finished = harness.files(folder / "out", "chunk*/**/*")
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        done = harness.attempt(command(job, folder / "out", straight), environment)
        assert done.returncode == 0, done.stderr[-2000:]
        assert same(job, folder / "out", straight) == []
        assert harness.files(folder / "out", "chunk*/**/*").items() >= finished.items()


# Want of memory


BALLOON = """
import sys, time
held = bytearray(int(sys.argv[1]))
held[::4096] = bytes([1]) * len(held[::4096])
time.sleep(600)
"""


def used() -> float:
    """Share of this machine's memory in use, about as Ray's monitor counts it."""
    memory = psutil.virtual_memory()
    return 1 - memory.available / memory.total


@contextlib.contextmanager
def cell(num_bytes: int) -> Iterator[Path]:
    """The file that takes the ids of processes which may have so much more memory, and are killed by the kernel beyond."""
    root = Path("/sys/fs/cgroup/memory" if Path("/sys/fs/cgroup/memory").is_dir() else "/sys/fs/cgroup")
    limit = "memory.max" if (root / "cgroup.controllers").exists() else "memory.limit_in_bytes"
    group = root / f"mdt-ray-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(num_bytes))
    except OSError:
        pytest.skip("may not limit memory here")
    try:
        yield group / "cgroup.procs"
    finally:
        end = time.monotonic() + 30
        while group.is_dir() and time.monotonic() < end:
            with contextlib.suppress(OSError):  # of those that are still dying
                group.rmdir()


@pytest.mark.parametrize("job", JOBS)
def test_a_worker_that_the_kernel_kills_for_want_of_memory_is_started_again(straight, tmp_path, job):
    output = tmp_path / "out"
    with clusters.head(tmp_path, num_cpus=4, **THREADS) as head, cell(8 * 2**20) as small:
        process = submitted(head, command(job, output, straight))
        title = {"train": "ray::RayTrainWorker", "tune": "ray::ImplicitFunc"}.get(job, "ray::MapWorker")
        harness.wait_until(lambda: processes(title, head) and any(output.glob("run.json")), process)
        victim = processes(title, head)[0]
        small.write_text(str(victim.pid))
        harness.wait_until(lambda: not victim.is_running(), process)
        text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    assert same(job, output, straight) == []


def test_where_ray_kills_all_for_want_of_memory_the_same_command_goes_on(straight, tmp_path):
    """A stranger takes the machine's memory for a while. Ray's monitor then kills workers, and where that does not help the
    process above the driver too."""
    total, job, output = psutil.virtual_memory().total, "evaluate", tmp_path / "out"
    threshold = used() + 4 * 2**30 / total
    if threshold > 0.9:
        pytest.skip("too little memory free for somebody to take it")
    with clusters.head(tmp_path, num_cpus=4, RAY_memory_usage_threshold=f"{threshold:.3f}",
                       RAY_memory_monitor_refresh_ms="100", **THREADS) as head:
        process = submitted(head, command(job, output, straight))
        harness.wait_until(lambda: any(output.glob("chunks/*")), process)
        before = {p.pid for p in processes("ray::MapWorker", head)}
        missing = int((threshold + 0.02 - used()) * total)
        balloon = subprocess.Popen([sys.executable, "-c", BALLOON, str(missing)])
        try:
            harness.wait_until(lambda: before - {p.pid for p in processes("ray::MapWorker", head)}, process)
        finally:
            balloon.kill()
            balloon.wait()
        text, _ = process.communicate(timeout=240)
        if process.returncode:
            assert "memory" in text
            process = submitted(head, command(job, output, straight))
            text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    assert same(job, output, straight) == []


def submitted(head: clusters.Head, arguments: list[str]) -> subprocess.Popen:
    """`mdt-ray submit <arguments>`."""
    return subprocess.Popen([sys.executable, "-m", "mdt_ray.cli", "submit", "--address", head.address, *arguments],
                            env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes(title: str, head: clusters.Head) -> list[psutil.Process]:
    """Those of a head's workers."""
    token, found = "RAY_AUTH_TOKEN_PATH", []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if " ".join(process.cmdline()).startswith(title) and process.environ()[token] == head.environment[token]:
                found.append(process)
    return found


# An object store that is full


HOG = """
import ray, sys, time, pathlib, numpy
ray.init()
held = [ray.put(numpy.full(20 * 2**20, k, numpy.uint8)) for k in range(20)]
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""


def test_jobs_run_while_the_object_store_is_full_and_spills(straight, tmp_path):
    """400 MB of a stranger's objects in a store of 200 MB."""
    hog = tmp_path / "hog.py"
    hog.write_text(HOG)
    with clusters.head(tmp_path, num_cpus=4, **THREADS) as head:
        held = subprocess.Popen([harness.RAY, "job", "submit", "--address", head.address, "--", sys.executable, str(hog),
                                 str(tmp_path / "full")], env=head.environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
        harness.wait_until((tmp_path / "full").exists, held)
        for job in JOBS:
            process = submitted(head, command(job, tmp_path / job, straight))
            text, _ = process.communicate(timeout=300)
            assert process.returncode == 0, text
            assert same(job, tmp_path / job, straight) == []
        assert held.poll() is None
        held.kill()
        held.communicate()


# Two drivers


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("place", ["disk", "store"])
def test_of_two_drivers_on_one_folder_one_writes(straight, tmp_path, environment, job, place):
    with s3.serve() if place == "store" else contextlib.nullcontext() as store:
        output = store.uri("out") if store else str(tmp_path / "out")
        drivers = [subprocess.Popen([sys.executable, "-m", "mdt_ray.cli", *command(job, output, straight)], env=environment,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
        texts = [driver.communicate(timeout=240)[0] for driver in drivers]
        assert sorted(driver.returncode for driver in drivers) == [0, 1], texts
        [text] = [text for text, driver in zip(texts, drivers, strict=True) if driver.returncode]
        assert "is being written by process" in text or "another run has taken over" in text
        if store:
            store.download("out", tmp_path / "out")
    assert same(job, tmp_path / "out", straight) == []


def test_a_sweep_that_was_taken_over_ends_and_leaves_its_trials_to_the_successor(straight, tmp_path, environment):
    """They are no failures: the successor's ledger would have them as such for good."""
    output = tmp_path / "out"
    driver = subprocess.Popen([sys.executable, "-m", "mdt_ray.cli", *command("tune", output, straight)], env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    harness.wait_until(lambda: list(output.glob("trainings/*/checkpoints/step-????????")), driver)
    lock = json.loads((output / "lock.json").read_text())
    storage.write_json(str(output / "lock.json"), lock | {"token": "the successor's"})
    text = driver.communicate(timeout=240)[0]
    assert driver.returncode == 1
    assert "another run has taken over" in text.strip().splitlines()[-1]
    results = [json.loads(path.read_text()) for path in output.glob("trials/*/result.json")]
    assert all(result["status"] == "finished" for result in results)
    assert json.loads((output / "lock.json").read_text())["token"] == "the successor's"
    (output / "lock.json").unlink()
    harness.run(command("tune", output, straight), environment)
    assert same("tune", output, straight) == []


# Damaged files


@pytest.mark.parametrize(("name", "data"), [
    ("manifest.json", b"{"), ("manifest.json", b""), ("manifest.json", b"[]"), ("manifest.json", b'{"schema_version": 2}'),
    ("manifest.json", b'{"schema_version": 2, "files": [{}]}'), ("chunk-00003.parquet", b""),
    ("chunk-00003.parquet", None)])
def test_damaged_latents_are_named_and_precompute_mends_them(straight, tmp_path, environment, name, data):
    folder = tmp_path / "latents"
    shutil.copytree(straight / "precompute", folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:200] + b"x" + whole[201:] if data is None else data)
    arguments = ["train", "digits", "--latents", str(folder), "--output", str(tmp_path / "out"), *TRAIN, "--num-steps", "2"]
    done = harness.attempt(arguments, environment)
    if data is not None:  # bytes in the middle that changed show when they are read, if at all
        assert done.returncode == 1
        assert name in last_line(done)
        assert "mdt-ray precompute" in last_line(done)
    mended = harness.attempt(command("precompute", folder, straight), environment)
    if mended.returncode:
        assert name in last_line(mended)
        assert "delete it" in last_line(mended)
        (folder / name).unlink()
        mended = harness.attempt(command("precompute", folder, straight), environment)
    assert mended.returncode == 0, mended.stderr
    if data is None:
        verified = harness.attempt(["latents", "verify", str(folder)], environment)
        assert verified.returncode == 1
        assert name in verified.stdout + verified.stderr
        assert harness.attempt(command("precompute", folder, straight), environment).returncode == 0
        (folder / f"{name}.damaged").unlink()  # set aside by `verify`
    assert same("precompute", folder, straight) == []
    assert harness.attempt(arguments, environment).returncode == 0


@pytest.mark.parametrize("name", ["state.json", "optimizer.pt", "model/diffusion_pytorch_model.safetensors",
                                  "checksums.json"])
def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(straight, tmp_path, environment, name):
    output = tmp_path / "out"
    shutil.copytree(straight / "train", output)
    newest = Path(checkpoints.latest(str(output)))
    data = (newest / name).read_bytes()
    (newest / name).write_bytes(data[: len(data) // 2])
    done = harness.attempt(command("train", output, straight), environment)
    assert done.returncode == 0, done.stderr
    assert str(newest) in done.stderr
    assert same("train", output, straight) == []


# Slow storage


@pytest.mark.parametrize("job", JOBS)
def test_a_slow_store_changes_nothing(straight, tmp_path, environment, job):
    """A fifth of a second for each packet of at most 64 kB there and back."""
    with s3.serve() as store, s3.forwarded(store, 0.1) as slow:
        done = harness.attempt(command(job, slow.uri("out"), straight), environment, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        store.download("out", tmp_path / "out")
    assert same(job, tmp_path / "out", straight) == []
