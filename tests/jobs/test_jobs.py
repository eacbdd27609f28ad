"""train and tune on a real Ray: what they write, what they refuse, what they leave out."""

import contextlib
import dataclasses
import time

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group

from mdt_ray import checkpoints, run_folder, storage
from mdt_ray.config import WorkersConfig
from mdt_ray.data import latents
from mdt_ray.interrupts import Wish
from mdt_ray.jobs import control
from mdt_ray.jobs import train as training
from mdt_ray.jobs.previews import Previews
from mdt_ray.jobs.train import prepare, train
from mdt_ray.training import run as rank
from mdt_ray.training import samples
from mdt_ray.training.contract import write_metrics
from mdt_ray.training.run import run_rank
from tests.helpers import make_latents, tiny_training

pytestmark = pytest.mark.ray


# train


@pytest.mark.slow
def test_workers_agree_whatever_their_number(tmp_path, ray_session):
    """1 worker, and 3 that own 4 of 12 lanes each: same images, same losses to 1e-5 in float32."""
    make_latents(tmp_path / "latents", num_images=130)
    rows = []
    for count in (1, 3):
        config = tiny_training(tmp_path / "latents", tmp_path / str(count), num_steps=10,
                               workers=WorkersConfig(num_workers=count, cpus_per_worker=0.5))
        uri = train(config)
        rows.append(checkpoints.read_metrics(storage.join(uri, "metrics.parquet")))
    for one, three in zip(*rows, strict=True):
        assert one["loss_full"] == pytest.approx(three["loss_full"], rel=1e-5)
        assert one["loss_masked"] == pytest.approx(three["loss_masked"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(three["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_an_error_in_a_worker_reaches_the_caller_as_itself(tmp_path, ray_session):
    manifest = make_latents(tmp_path / "latents")
    path = tmp_path / "latents" / manifest.files[0].name
    data = path.read_bytes()
    path.write_bytes(b"\0" * (len(data) // 2) + data[len(data) // 2:])  # its index is whole: only a worker finds out
    config = tiny_training(tmp_path / "latents", tmp_path / "out")
    with pytest.raises(ValueError, match=r"chunk-00000.parquet: row group \d is not readable"):
        train(config)
    assert not (tmp_path / "out" / "lock.json").exists()


@pytest.mark.slow
def test_workers_that_outlive_their_run_touch_nothing_and_are_not_started_again(tmp_path, ray_session, caplog):
    make_latents(tmp_path / "latents")
    config = tiny_training(tmp_path / "latents", tmp_path / "out")
    theirs = tmp_path / "out" / "checkpoints" / "step-00000010.tmp-theirs"
    theirs.mkdir(parents=True)
    storage.write_json(str(tmp_path / "out" / "lock.json"), {"token": "theirs"})
    with pytest.raises(run_folder.TakenOver, match="another run has taken over; this one stops"):
        train(config, above=run_folder.Claim(config.output, "mine"))
    assert theirs.exists()
    assert "a training worker was lost" not in caplog.text


def test_metrics_that_a_kill_kept_from_being_written_come_with_the_next_run(tmp_path):
    """Between the last checkpoint and the metrics beside it, there is a moment."""
    make_latents(tmp_path / "latents")
    config, manifest, run = prepare(tiny_training(tmp_path / "latents", tmp_path / "out"))
    run_folder.record(config.output, run)
    run_rank(config, manifest, run)
    metrics = storage.join(config.output, "metrics.parquet")
    whole = storage.read_bytes(metrics)
    write_metrics(config.output, checkpoints.read_metrics(metrics)[:10])
    for _ in range(2):
        train(config)
        assert storage.read_bytes(metrics) == whole
        storage.remove(metrics)


def test_the_lock_of_a_driver_that_its_workers_outlived_goes_with_the_next_run(tmp_path):
    """They end a training alone where the host of the driver, and with it Ray's head, is lost."""
    make_latents(tmp_path / "latents")
    config, manifest, run = prepare(tiny_training(tmp_path / "latents", tmp_path / "out"))
    with run_folder.claim(config.output, run):
        lock = storage.read_json(storage.join(config.output, "lock.json"))
    run_rank(config, manifest, run)
    storage.write_json(storage.join(config.output, "lock.json"), lock | {"started": "0"})
    storage.write_bytes(storage.join(config.output, "ray/train/.validate_storage_marker"), b"")
    train(config)
    assert not {"lock.json", "ray"} & set(storage.list_names(config.output))


def test_samples_that_a_kill_kept_out_of_the_metrics_come_with_the_next_run(tmp_path):
    make_latents(tmp_path / "latents")
    config, manifest, run = prepare(tiny_training(tmp_path / "latents", tmp_path / "out"))
    run_folder.record(config.output, run)
    run_rank(config, manifest, run)
    metrics = tmp_path / "out" / "metrics.parquet"
    last = checkpoints.read_metrics(str(metrics))[-1]["step"]
    storage.write_json(storage.join(samples.folder_of(config.output, last), "preview.json"), {"columns": {"fid": 1.5}})
    train(config)
    assert checkpoints.read_metrics(str(metrics))[-1]["fid"] == 1.5
    written = metrics.stat().st_mtime_ns
    train(config)
    assert metrics.stat().st_mtime_ns == written, "once"


def test_only_who_owns_a_folder_looks_at_the_nodes_for_it(tmp_path, monkeypatch):
    """A sweep has looked: a trial, whose errors are its own, is not to fail for a node that went since."""
    def fail(*arguments):
        raise ValueError("1 of 2 nodes cannot train")

    def begin(*arguments):
        raise RuntimeError("begun")

    make_latents(tmp_path / "latents")
    config = tiny_training(tmp_path / "latents", tmp_path / "out")
    monkeypatch.setattr(training.session, "start_heeding", Wish)
    monkeypatch.setattr(training.preflight, "check_nodes", fail)
    monkeypatch.setattr(training, "_train_to_the_end", begin)
    with pytest.raises(ValueError, match="nodes cannot train"):
        train(config)
    with pytest.raises(RuntimeError, match="begun"):
        train(config, wish=Wish(), above=run_folder.Claim(config.output, "the sweep's"))


@pytest.mark.slow
@pytest.mark.parametrize("taken", [True, False])
def test_a_start_for_which_others_took_the_room_is_no_failure(tmp_path, monkeypatch, ray_session, taken):
    """Many may wait for the same room. Where there is room and workers do not start, it is one."""
    make_latents(tmp_path / "latents")
    config = tiny_training(tmp_path / "latents", tmp_path / "out")
    launch, was_outrun, others = training._launch, training._was_outrun, []

    def late(*arguments):
        if not others:
            others.append(placement_group([{"CPU": 1}] * int(ray_session.cluster_resources()["CPU"])))
            ray_session.get(others[0].ready())
        try:
            return launch(*arguments)
        finally:
            if not taken:
                remove_placement_group(others[0])

    def judged(*arguments) -> bool:
        found = was_outrun(*arguments)
        remove_placement_group(others[0])
        return found

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    monkeypatch.setattr(training, "MAX_FAILURES", 0)
    monkeypatch.setattr(training, "_launch", late)
    monkeypatch.setattr(training, "_was_outrun", judged)
    with contextlib.nullcontext() if taken else pytest.raises(WorkerGroupStartupTimeoutError):
        train(config)
    assert training.is_finished(config) == taken


def test_a_run_that_finds_the_room_for_more_taken_looks_for_longer_the_next_time(tmp_path, monkeypatch):
    """Else two of them take one slot from each other twice a minute."""
    make_latents(tmp_path / "latents")
    config, _, run = prepare(tiny_training(tmp_path / "latents", tmp_path / "out", workers=WorkersConfig(num_workers=3)))
    room, waited = iter([2, 2, 1, 2, 2, 2, 2, 2, 2, 2, 3]), []

    def launch(config, run, claim, num_workers, grow_after, *others):
        waited.append(grow_after)
        return None if num_workers == 3 else control.GROWS

    monkeypatch.setattr(training, "_wait_for_room", lambda *arguments: next(room))
    monkeypatch.setattr(training, "_launch", launch)
    training._train_to_the_end(config, run, run_folder.Claim(config.output, ""), Wish(), print, Previews(config, print))
    assert waited == [30, 60, 120, 30, 60, 120, 240, 480, 480, 480, 30]


def test_samples_wait_until_the_workers_have_arrived(tmp_path, monkeypatch, ray_session):
    """Their task would take the room of a worker, which then waits for it."""
    make_latents(tmp_path / "latents")
    config, _, run = prepare(tiny_training(tmp_path / "latents", tmp_path / "out"))
    looked, before = [], []

    def fit(trainer) -> None:
        time.sleep(3 * control.POLL_SECONDS)
        before.extend(looked)
        trainer.train_loop_config["control"].arrive.remote(0, "node")
        end = time.monotonic() + 20
        while not looked and time.monotonic() < end:
            time.sleep(0.05)

    monkeypatch.setattr(training, "_fit", fit)
    training._launch(config, run, run_folder.Claim(config.output, ""), 1, 30, Wish(), print, lambda: looked.append(1))
    assert looked
    assert not before


def test_a_store_that_is_away_is_no_bad_setting_of_a_run_that_starts_from_weights(tmp_path, monkeypatch):
    def read(source: str) -> None:
        try:
            raise ConnectionError("no answer")
        except OSError as error:
            raise ValueError(f"{source}: no such file") from error

    make_latents(tmp_path / "latents")
    config, manifest, run = prepare(tiny_training(tmp_path / "latents", tmp_path / "out"))
    monkeypatch.setattr(rank, "load_any", read)
    with pytest.raises(OSError, match="s3://bucket/weights: no such file"):
        run_rank(dataclasses.replace(config, init_from="s3://bucket/weights"), manifest, run)


def test_what_ray_wrote_for_a_successor_stays(tmp_path, monkeypatch):
    (tmp_path / "ray").mkdir()
    mine = run_folder.Claim(str(tmp_path), "mine")
    storage.write_json(str(tmp_path / "lock.json"), {"token": "theirs"})
    training._clear(str(tmp_path), mine)
    assert (tmp_path / "ray").exists()
    storage.write_json(str(tmp_path / "lock.json"), {"token": "mine"})
    training._clear(str(tmp_path), mine)
    assert not (tmp_path / "ray").exists()


def test_latents_round_trip_through_the_manifest(tmp_path):
    manifest = make_latents(tmp_path)
    assert latents.open_manifest(str(tmp_path)) == manifest
