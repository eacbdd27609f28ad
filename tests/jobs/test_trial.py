"""What becomes of a trial that raises: its own fault is written down, what the machine or the cluster did is not."""

import contextlib
import dataclasses

import pytest
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError
from ray.util.placement_group import placement_group, remove_placement_group

from mdt_ray import checkpoints, run_folder, storage
from mdt_ray.config import TuneConfig
from mdt_ray.data.npz import open_archive
from mdt_ray.interrupts import Stopped, Wish
from mdt_ray.jobs import control, search, trial
from mdt_ray.run_folder import Claim
from tests import s3
from tests.helpers import make_latents, tiny_training


@pytest.fixture
def one(tmp_path) -> trial.Trial:
    make_latents(tmp_path / "latents")
    train = tiny_training(tmp_path / "latents", tmp_path / "out")
    return trial.resolve_trial(TuneConfig(output=str(tmp_path / "out"), train=train, equal="steps"),
                               {"loss.mask_ratio": 0.3}, 0)


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError("numpy"), torch.OutOfMemoryError("CUDA"),
                                   RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")])
def test_its_own_fault_is_written_down(one, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(trial, "_train", fail)
    result = trial.run(one, "", Claim("", ""), lambda row: None, Wish())
    assert result == one.result()
    assert (result["status"], result["reason"]) == ("failed", f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("error", [OSError("disk"), NodeDiedError("node"), RuntimeError("NCCL error")])
def test_what_may_not_come_again_is_raised(one, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(trial, "_train", fail)
    with pytest.raises(type(error)):
        trial.run(one, "", Claim("", ""), lambda row: None, Wish())
    assert one.result() is None


@pytest.mark.parametrize(("error", "failed"), [
    (KeyError("x"), True), (RuntimeError("NCCL error"), True), (OutOfMemoryError("killed"), True),
    (OSError("disk"), False), (NodeDiedError("node"), False)])
def test_after_some_times_it_has_failed_unless_its_processes_were_lost(one, error, failed):
    search._give_up([one], error)
    assert ((one.result() or {}).get("status") == "failed") == failed


@pytest.mark.parametrize(("cause", "told"), [
    (OSError("When reading from bucket: AWS Error NETWORK_CONNECTION"), OSError), (ConnectionError("hub"), OSError),
    (OSError("When reading from bucket: AWS Error ACCESS_DENIED"), ValueError), (PermissionError("no"), ValueError),
    (FileNotFoundError("none"), ValueError), (KeyError("x"), ValueError)])
def test_what_does_not_answer_is_told_from_what_says_no(cause, told):
    with pytest.raises(told) as caught, storage.outages_told():
        raise ValueError("cannot be read") from cause
    assert type(caught.value) is told


def test_no_checkpoint_is_kept_for_samples_that_nobody_draws(one, tmp_path):
    train = dataclasses.replace(one.train, num_steps=6, checkpoint_every_steps=2, keep_last=1, sample_every_steps=2)
    with run_folder.claim(str(tmp_path / "out"), {"identity": {}, "config": {}}) as claim:
        trial._train(train, claim, lambda row: None, Wish())
    assert [checkpoints.step_of(uri) for uri in checkpoints.list_finished(train.output)] == [6]


@pytest.mark.ray
def test_a_stop_reaches_a_trial_that_waits_for_room_to_be_judged(one, ray_session):
    everything = placement_group([{"CPU": 1}] * int(ray_session.cluster_resources()["CPU"]))
    ray_session.get(everything.ready())
    channel = control.open_control()
    try:
        with contextlib.closing(control.Asked(channel)) as asked:
            channel.ask_to_stop.remote()
            with pytest.raises(Stopped):
                trial._judge_apart(one, "", asked)
    finally:
        ray_session.kill(channel)
        remove_placement_group(everything)


@pytest.mark.slow
def test_what_a_store_that_is_away_holds_back_is_no_fault_of_a_trial(monkeypatch):
    """It would be failed for good after half a minute without the store. A file that is not there is somebody's to mend."""
    s3.give_keys(monkeypatch)
    monkeypatch.setattr(storage, "RETRY_SECONDS", ())
    def read(uri: str) -> None:
        with storage.outages_told(), open_archive(uri):
            pass

    with s3.serve() as store, s3.forwarded(store) as line:
        with pytest.raises(ValueError, match=r"real\.npz.*: no such file"):
            read(line.uri("real.npz"))
        with line.cut(), pytest.raises(OSError, match=r"real\.npz.*: cannot be read"):
            read(line.uri("real.npz"))


def test_a_suggested_point_is_written_down_before_it_starts(one):
    one.begin()
    begun = storage.read_json(f"{one.folder}/begun.json")
    assert begun == {"name": one.name, "point": one.point, "seed": 0}
    assert one.result() is None
