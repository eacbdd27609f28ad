"""Samples of a training run on the way, drawn beside it."""

import dataclasses
import json
import os
import signal
import threading
from pathlib import Path

import pytest
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mdt_ray import checkpoints, presets
from mdt_ray.config import EvaluateConfig, SamplingConfig, WorkersConfig
from mdt_ray.training import samples
from tests import harness

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def config(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("previews")
    harness.run_here(["precompute", "digits", "--output", f"{folder}/latents", "--workers.num-workers", "1"])
    judged = EvaluateConfig(reference="digits", extractor="digits", num_samples=40, keep_images=20, chunk_size=900,
                            sampling=SamplingConfig(sampler="dpm-solver++", num_sampling_steps=4))
    return dataclasses.replace(
        presets.digits().train, latents=f"{folder}/latents", output=f"{folder}/train", num_steps=30, log_every_steps=5,
        checkpoint_every_steps=5, keep_last=1, keep_every_steps=0, sample_every_steps=10, samples=judged,
        workers=WorkersConfig(num_workers=1))


def test_samples_are_drawn_and_measured_beside_training(config):
    from mdt_ray.jobs.train import train

    train(config)
    rows = checkpoints.read_metrics(f"{config.output}/metrics.parquet")
    assert [row["step"] for row in rows if "fid_digits_40" in row] == [10, 20, 30]
    assert all(row["fid_digits_40"] > 0 for row in rows if row["step"] % 10 == 0)
    for step in (10, 20, 30):
        folder = samples.folder_of(config.output, step)
        with open(f"{folder}/grid.png", "rb") as file:
            assert file.read(4) == b"\x89PNG"
    # Steps 10 and 20 stayed until their samples were drawn, and then went.
    assert [checkpoints.step_of(uri) for uri in checkpoints.list_finished(config.output)][-1:] == [30]
    assert harness.leftovers(Path(config.output)) == []


def test_a_finished_run_makes_the_samples_that_lack(config):
    from mdt_ray.jobs.train import train

    folder = Path(config.output) / "samples" / "step-00000030"
    before = (folder / "metrics.json").read_bytes()
    for name in ("preview.json", "metrics.json"):
        (folder / name).unlink()
    newest = Path(config.output) / "checkpoints" / "step-00000030" / "checksums.json"
    written = newest.stat().st_mtime_ns
    train(config)
    assert (folder / "preview.json").exists()
    assert b"fid_digits" in before
    assert newest.stat().st_mtime_ns == written, "nothing is trained again"


def test_samples_that_fail_leave_training_alone(config, caplog):
    from mdt_ray.jobs.train import train

    folder = Path(config.output) / "samples" / "step-00000030"
    (folder / "preview.json").unlink()
    other = dataclasses.replace(config, samples=dataclasses.replace(config.samples, num_samples=50))
    assert train(other).endswith("30")  # the folder holds the evaluation of 40: refused there
    assert "no samples of step 30" in caplog.text
    assert "holds another run" in caplog.text
    train(other)  # and not tried again
    assert caplog.text.count("no samples of step 30") == 1


def again(config) -> Path:
    """The samples of the last step, to be drawn again from what they have."""
    folder = Path(config.output) / "samples" / "step-00000030"
    (folder / "preview.json").unlink()
    return folder / "preview.json"


def test_a_trial_of_several_workers_draws_them_outside_of_what_tune_reserved(config, ray_session):
    """For the process that waits for them, which is nothing."""
    @ray_session.remote(num_cpus=0, memory=1)
    def within(config):
        from mdt_ray.interrupts import Wish
        from mdt_ray.jobs.previews import Previews

        Previews(config, lambda row: None).finish(Wish())

    told = again(config)
    group = placement_group([{"CPU": 0, "memory": 1}])
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    try:
        ray_session.get(within.options(scheduling_strategy=strategy).remote(config))
    finally:
        remove_placement_group(group)
    assert told.exists()


def test_a_task_that_dies_again_and_again_is_given_up(config, caplog):
    from mdt_ray.jobs.train import train

    told, over, killed = again(config), threading.Event(), set()
    (told.parent / "metrics.json").unlink()

    def kill() -> None:
        while not over.wait(0.1):
            for pid in harness.ray_processes("_preview"):
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        train(config)
    finally:
        over.set()
        thread.join()
    assert json.loads(told.read_text())["error"]
    assert caplog.text.count("the samples of step 30 are drawn again") == 2
    assert len(killed) == 3


def test_without_real_images_there_is_just_a_picture(config):
    from mdt_ray.jobs.train import train

    other = dataclasses.replace(config, output=f"{config.output}-pictures", num_steps=10,
                                samples=dataclasses.replace(config.samples, reference=""))
    train(other)
    assert (Path(other.output) / "samples" / "step-00000010" / "grid.png").exists()
    assert not any("fid" in name for row in checkpoints.read_metrics(f"{other.output}/metrics.parquet") for name in row)


def test_a_bad_reference_stops_before_anything_starts(config):
    from mdt_ray.jobs.train import train

    other = dataclasses.replace(config, output=f"{config.output}-bad",
                                samples=dataclasses.replace(config.samples, reference="/no/such/folder"))
    with pytest.raises(ValueError, match="/no/such/folder"):
        train(other)
    assert not Path(other.output).exists()
