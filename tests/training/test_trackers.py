"""Trackers with the real packages: what they were given is read back, restarts show no step twice, failures cost no run."""

import logging
import math
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdt_ray import config_io, run_folder, storage
from mdt_ray.config import TrackConfig, TrainConfig
from mdt_ray.training import trackers
from mdt_ray.training.trackers import Tracker, open_trackers
from tests import s3
from tests.conftest import ROOT

RUN = run_folder.describe("train", TrainConfig(latents="l", output="o"), {})


def row(step: int, **more: float) -> dict:
    return {"step": step, "images_seen": step * 8, "loss": 1 / step, **more}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wait_for(condition: Callable[[], bool]) -> None:
    """Until a tracker's own thread got there."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def failing_after(report: Callable[[dict], None], step: int) -> None:
    report(row(step))
    raise KeyError("the run fails")


@pytest.fixture
def warned(caplog):
    """The warnings of trackers so far, as text."""
    caplog.set_level(logging.WARNING, trackers.__name__)
    return lambda: [r.getMessage() for r in caplog.records if r.name == trackers.__name__]


# TensorBoard


def test_tensorboard_groups_what_it_is_given(tmp_path):
    with open_trackers(TrackConfig(), str(tmp_path), RUN, 0) as report:
        report(row(5, grad_norm=float("nan"), loss_full=0.5))
        report({"step": 5, "val_loss": 0.75, "fid_digits": 9.0, "sfid_digits": 8.0, "samples_seen": 100, "grid": "g.png"})
        report(row(10))
    found = scalars(tmp_path / "tensorboard")
    assert found.keys() == {"train/images_seen", "train/loss", "train/loss_full", "train/grad_norm", "validation/loss",
                            "samples/fid_digits", "samples/sfid_digits", "samples/seen"}
    assert found["train/loss"] == [(5, pytest.approx(0.2)), (10, pytest.approx(0.1))]
    assert found["train/images_seen"] == [(5, 40), (10, 80)]
    assert found["validation/loss"] == [(5, 0.75)]
    assert math.isnan(found["train/grad_norm"][0][1])


def test_tensorboard_hides_what_a_run_went_back_from(tmp_path):
    with open_trackers(TrackConfig(), str(tmp_path), RUN, 0) as report:
        for step, attempt in ((1, 0), (2, 0), (3, 0), (2, 1), (3, 1)):
            report(row(step, attempt=attempt, lr=attempt))
    assert scalars(tmp_path / "tensorboard")["train/lr"] == [(1, 0), (2, 1), (3, 1)]


def test_tensorboard_shows_the_settings_once(tmp_path):
    for first_step in (0, 0, 10):
        with open_trackers(TrackConfig(), str(tmp_path), RUN, first_step) as report:
            report(row(first_step + 5))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("config")
    assert '"batch_size": 256' in text.tensor_proto.string_val[0].decode()


REPORT_AND_WAIT = """
import sys, time
from mdt_ray.config import TrackConfig
from mdt_ray.training.trackers import open_trackers
with open_trackers(TrackConfig(), sys.argv[1], {"config": {}}, 0) as report:
    for step in (5, 10, 15):
        report({"step": step, "loss": 1 / step})
    assert not {"mlflow", "wandb"} & set(sys.modules), "imported without being asked for"
    print("reported", flush=True)
    time.sleep(600)
"""


def test_a_clock_that_went_back_shows_no_step_twice(tmp_path, monkeypatch):
    for first_step, clock in ((0, 2_000_000_000), (10, 1_900_000_000), (10, 1_900_000_000)):
        monkeypatch.setattr(trackers.time, "time", lambda clock=clock: clock)
        with open_trackers(TrackConfig(), str(tmp_path), RUN, first_step) as report:
            for step in range(first_step + 5, 20, 5):
                report(row(step))
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["train/loss"]] == [5, 10, 15]


def test_a_full_disk_costs_no_row_once_there_is_room_again(tmp_path, warned):
    """A limit on the size of this process's files is what a disk without room looks like from inside."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_trackers(TrackConfig(), str(tmp_path), RUN, 0) as report:
        (file,) = (tmp_path / "tensorboard").iterdir()
        wait_for(lambda: file.stat().st_size > 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, old[1]))
        try:
            report(row(5))
            report(row(10))
            wait_for(warned)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        report(row(15))
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["train/loss"]] == [5, 10, 15]
    (message,) = warned()
    assert message.startswith("tensorboard failed (OSError: [Errno 27]")


def test_after_a_kill_each_step_is_there_once(tmp_path):
    command = [sys.executable, "-c", REPORT_AND_WAIT, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"reported\n"
            # Rows do not wait for the end.
            wait_for(lambda: len(scalars(tmp_path / "tensorboard").get("train/loss", ())) == 3)
        finally:
            process.kill()
    with open_trackers(TrackConfig(), str(tmp_path), RUN, 10) as report:
        assert [step for step, _ in scalars(tmp_path / "tensorboard")["train/loss"]] == [5, 10]
        report(row(15))
        report(row(20))
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["train/loss"]] == [5, 10, 15, 20]


def test_tensorboard_on_an_object_store(tmp_path, monkeypatch, warned):
    s3.give_keys(monkeypatch)
    monkeypatch.setattr(trackers, "UPLOAD_SECONDS", 0.0)
    with s3.serve() as store:

        def arrived(number: int) -> list[int]:
            copy = tmp_path / str(number)
            for name, data in store.objects("run/tensorboard").items():
                storage.write_bytes(f"{copy}/{name}", data)
            return [step for step, _ in scalars(copy).get("train/loss", ())] if copy.is_dir() else []

        with open_trackers(TrackConfig(), store.uri("run"), RUN, 0) as report:
            report(row(5))
            wait_for(lambda: arrived(0) == [5])  # before the end, that is
            report(row(10))
        assert arrived(1) == [5, 10]
        # A bucket that is gone for a while: one warning, and the file is whole once it is back.
        with open_trackers(TrackConfig(), store.uri("run"), RUN, 5) as report:
            kept = store.objects("run/tensorboard")
            store.fs.delete_dir(s3.BUCKET)
            report(row(10))
            report(row(15))
            wait_for(warned)
            store.fs.create_dir(s3.BUCKET)
            for name, data in kept.items():
                store.put(f"run/tensorboard/{name}", data)
        assert arrived(2) == [5, 10, 15]
        (message,) = warned()
        assert message.startswith("tensorboard failed (OSError: s3://")


# Weights & Biases, offline: its own file of records is read


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb")
    yield wandb
    wandb.teardown()


def records(folder: Path) -> list:
    """The records of all .wandb files of an output, oldest first: LevelDB's log format behind a header of seven bytes."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its own process writes them, to the end only when it ends
    found = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime_ns):
        data, position, record = file.read_bytes(), 7, b""
        while position + 7 <= len(data):
            left = 32768 - position % 32768
            if left < 7:
                position += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            record += data[position + 7:position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last part
                found.append(Record.FromString(record))
                record = b""
    return found


def test_wandb_goes_on_with_the_same_run(tmp_path, wandb):
    config = TrackConfig(wandb="team/mdt", name="tiny")
    with open_trackers(config, str(tmp_path), RUN, 0) as report:
        report(row(5, grad_norm=float("inf")))
        report(row(10))
        report({"step": 5, "fid_digits": 9.0})  # late: the samples of an earlier checkpoint
    with pytest.raises(KeyError), open_trackers(config, str(tmp_path), RUN, 10) as report:
        failing_after(report, 15)
    found = records(tmp_path)
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert {(r.entity, r.project) for r in runs} == {("team", "mdt")}
    assert runs[0].display_name == "tiny"
    assert len({r.run_id for r in runs}) == 1
    assert storage.read_json(str(tmp_path / "tracking.json"))["wandb"]["id"] == runs[0].run_id
    settings = {u.key: u.value_json for u in runs[0].config.update}
    assert settings["batch_size"] == "256"
    rows = [{i.nested_key[0]: i.value_json for i in r.history.item} for r in found
            if r.WhichOneof("record_type") == "history"]
    assert [(r["step"], r.get("train/loss"), r.get("samples/fid_digits")) for r in rows] == [
        ("5", "0.2", None), ("10", "0.1", None), ("5", None, "9"), ("15", "0.06666666666666667", None)]
    axes = {r.metric.step_metric for r in found if r.WhichOneof("record_type") == "metric" and r.metric.glob_name == "*"}
    assert axes == {"step"}
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [0, 1]
    # Another project is another run.
    with open_trackers(TrackConfig(wandb="other"), str(tmp_path), RUN, 10):
        pass
    assert storage.read_json(str(tmp_path / "tracking.json"))["wandb"]["id"] != runs[0].run_id


def test_wandb_leaves_a_run_that_is_open_alone(tmp_path, wandb):
    other = wandb.init(project="mine", dir=str(tmp_path))
    with open_trackers(TrackConfig(wandb="mdt"), str(tmp_path / "output"), RUN, 0) as report:
        report(row(5))
    other.log({"mine": 1})
    other.finish()
    names = {i.nested_key[0] for r in records(tmp_path) for i in r.history.item}
    assert "mine" in names
    assert "train/loss" not in names


def test_a_tracker_that_refuses_stops_a_new_run_only(tmp_path, wandb, monkeypatch, warned):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "not a key")  # refused before any request
    config = TrackConfig(wandb="mdt")
    with pytest.raises(ValueError, match=r"track.wandb = 'mdt': cannot be opened"), \
            open_trackers(config, str(tmp_path), RUN, 0):
        pass
    storage.write_json(str(tmp_path / "tracking.json"), {"wandb": {"at": "mdt", "id": "abc"}})
    with open_trackers(config, str(tmp_path), RUN, 0) as report:
        report(row(5))
    (message,) = warned()
    assert message.startswith("wandb cannot be opened")
    assert scalars(tmp_path / "tensorboard")["train/images_seen"] == [(5, 40)]


# MLflow


@pytest.fixture
def mlflow():
    return pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mdt-ray[mlflow]")


SQLALCHEMY = "ignore:.*noload.*"  # what MLflow 3.17 asks of SQLAlchemy 2.1


@pytest.mark.filterwarnings(SQLALCHEMY)
def test_mlflow_goes_on_with_the_same_run(tmp_path, mlflow, warned):
    import sqlalchemy

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    output, config = str(tmp_path / "tiny"), TrackConfig(mlflow=uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    with open_trackers(config, output, RUN, 0) as report:
        report(row(5, grad_norm=float("nan")))
        report(row(10, val_loss=0.5))
    (run,) = client.search_runs([client.get_experiment_by_name("mdt-ray").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    assert run.data.params == {key: str(value) for key, value in config_io.flatten(RUN["config"]).items()}
    assert run.data.tags["mdt_ray.run"] == RUN["name"]
    assert run.data.metrics["validation/loss"] == 0.5
    assert math.isnan(run.data.metrics["train/grad_norm"])

    longer = run_folder.describe("train", TrainConfig(latents="l", output="o", num_steps=9), {})
    with pytest.raises(KeyError), open_trackers(config, output, longer, 10) as report:
        failing_after(report, 15)
    (run,) = client.search_runs([run.info.experiment_id])
    assert run.info.status == "FAILED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [5, 10, 15]

    # A store that breaks while training: one warning, and the others go on.
    with open_trackers(config, output, RUN, 15) as report:
        assert client.get_run(run.info.run_id).info.status == "RUNNING"
        engine = sqlalchemy.create_engine(uri)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("DROP TABLE metrics"))
        engine.dispose()
        report(row(20))
        report(row(25))
    (message,) = warned()
    assert message.startswith("mlflow failed (")
    assert [step for step, _ in scalars(tmp_path / "tiny" / "tensorboard")["train/loss"]] == [5, 10, 15, 20, 25]


# All


@pytest.mark.parametrize("package", ["mlflow", "wandb"])
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    output = tmp_path / "output"
    with pytest.raises(ValueError, match=rf"track.{package} = 'x': needs .* `pip install mdt-ray\[{package}\]`"), \
            open_trackers(TrackConfig(**{package: "x"}), str(output), RUN, 0):
        pass
    assert not output.exists()


def test_a_tracker_that_hangs_holds_nothing_up(warned, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE_SECONDS", 0.01)
    answers, logged = threading.Event(), []

    def log(step: int, values: dict[str, float]) -> None:
        answers.wait()
        logged.append(step)
        raise ConnectionError(f"no answer at {step}")

    with trackers._Feeder("far", Tracker(log, logged.append)) as feeder:
        for step in (1, 2, 3):
            feeder.put(step, {})
    assert logged == []
    assert warned() == ["far did not take its last rows within 0 s; the run goes on, and metrics.parquet has every row"]
    answers.set()
    wait_for(lambda: logged == [1, 2, 3, True])


def test_trackers_are_no_part_of_the_identity():
    changed = TrainConfig(track=TrackConfig(mlflow="x", experiment="e", wandb="w", name="n"))
    assert config_io.identity_fields(changed) == config_io.identity_fields(TrainConfig())
    with pytest.raises(ValueError, match=r"track.experiment = ''"):
        TrackConfig(experiment="")
