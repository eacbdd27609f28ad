"""Where the rows of a training run also go: TensorBoard's event files, MLflow, Weights & Biases, behind one `report`.

Not the record of the run: that is metrics.parquet. A tracker that fails costs a warning and its rows, never the run.
"""

import contextlib
import importlib
import io
import json
import logging
import queue
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from mdt_ray import config_io, storage
from mdt_ray.config import TrackConfig

logger = logging.getLogger(__name__)
EVENTS = "tensorboard"
"""Folder of a training output that holds the event files."""
TRACKING = "tracking.json"
"""In a training output: its runs in MLflow and Weights & Biases, for the next start to go on with."""
UPLOAD_SECONDS = 30.0
"""Shortest time between two uploads of an event file to an object store: each replaces the whole file."""
PATIENCE_SECONDS = 60.0
"""Longest time that the end of a run waits for a tracker: MLflow alone would retry for minutes at each row."""
METRICS_OF_SAMPLES = ("fid", "sfid", "is", "precision", "recall", "kid", "fd", "kd", "label")
"""Evaluation's metrics, by the first word of their names (`fid_5k`, `label_accuracy_digits_1k`)."""
PARAMS_PER_REQUEST = 100
"""MLflow takes no more at once."""


class Tracker(NamedTuple):
    """An open tracker. Both functions may fail in any way."""

    log: Callable[[int, dict[str, float]], None]
    """Takes a step and its numbers by tag."""
    close: Callable[[bool], None]
    """Told whether the run ended well."""


@contextlib.contextmanager
def open_trackers(config: TrackConfig, output: str, run: dict[str, Any],
                  first_step: int) -> Iterator[Callable[[dict], None]]:
    """Yields `report(row)`: it hands a row of metrics to every tracker and returns at once.

    Args:
        config: which trackers.
        output: folder (URI) of the training run.
        run: content of its run.json.
        first_step: the step that training goes on from. Rows of later steps, of a killed predecessor, come again:
            TensorBoard then hides the old ones, MLflow and Weights & Biases draw the new ones over them.
    Raises ValueError naming the field if a package is missing or a tracker refuses a new run. If a run that is to go on
    cannot be opened, or a tracker fails later, that is a warning.
    """
    openers: dict[str, Callable[[], Tracker]] = {}
    if config.mlflow:
        openers["mlflow"] = partial(_mlflow, _import("mlflow", config.mlflow), config, output, run)
    if config.wandb:
        openers["wandb"] = partial(_wandb, _import("wandb", config.wandb), config, output, run)
    openers[EVENTS] = partial(_tensorboard, output, run, first_step)
    with contextlib.ExitStack() as stack:
        feeders = []
        for name, opener in openers.items():
            try:
                tracker = opener()
            except Exception as error:
                if name != EVENTS and not _remembered(config, output, name):
                    raise ValueError(f"track.{name} = {getattr(config, name)!r}: cannot be opened ({error}); mend that, or "
                                     "leave the field empty to train without") from error
                logger.warning("%s cannot be opened (%s); the run goes on without it until its next start", name, error)
            else:
                feeders.append(stack.enter_context(_Feeder(name, tracker)))

        def report(row: dict) -> None:
            values = tagged(row)
            for feeder in feeders:
                feeder.put(row["step"], values)

        yield report


def tagged(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by the tag that trackers show them under: train/, validation/ or samples/ and a name."""
    return {_tag(key): value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}


def _tag(key: str) -> str:
    first, _, rest = key.partition("_")
    if first == "val":
        return f"validation/{rest}"
    if first == "samples":
        return f"samples/{rest}"
    return f"samples/{key}" if first in METRICS_OF_SAMPLES else f"train/{key}"


class _Feeder:
    """Hands rows to one tracker in a thread of its own, so that a slow or dead one holds nothing up; warns once."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker, self._warned = name, tracker, False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"track-{name}")
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        self._calls.put(partial(self._tracker.log, step, values))

    def __enter__(self) -> "_Feeder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._calls.put(partial(self._tracker.close, kind is None))
        self._calls.put(None)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            self._warn(f"did not take its last rows within {PATIENCE_SECONDS:.0f} s")

    def _work(self) -> None:
        while call := self._calls.get():
            try:
                call()
            except Exception as error:
                self._warn(f"failed ({type(error).__name__}: {error})")

    def _warn(self, what: str) -> None:
        if not self._warned:
            logger.warning("%s %s; the run goes on, and metrics.parquet has every row", self._name, what)
        self._warned = True


def _tensorboard(output: str, run: dict[str, Any], first_step: int) -> Tracker:
    """An event file of this start. For an object store it grows in memory and is uploaded now and then, so a killed driver
    takes the rows of its last seconds with it.

    Written record by record: torch's SummaryWriter gives the file a name by the clock alone and, once a write has failed,
    refuses all that follow.
    """
    from tensorboard.compat.proto.event_pb2 import SessionLog
    from tensorboard.plugins.text import summary_v2 as texts

    folder = storage.join(output, EVENTS)
    seconds = [int(found[1]) for name in storage.list_names(folder) if (found := re.search(r"tfevents\.(\d+)", name))]
    # TensorBoard reads files in the order of their names, and the clock of this host may be behind the last one's.
    uri = storage.join(folder, f"events.out.tfevents.{max([int(time.time()), *(s + 1 for s in seconds)]):010d}.mdt_ray")
    local = storage.is_local(output)
    if local:
        storage.write_bytes(uri, b"")
    file = open(storage.resolve(uri)[1], "ab") if local else io.BytesIO()  # noqa: SIM115 (the tracker closes it)
    write = _event_writer(file)
    uploaded, attempt = -UPLOAD_SECONDS, None

    def log(step: int, values: dict[str, float]) -> None:
        nonlocal uploaded, attempt
        before, attempt = attempt, values.get("train/attempt", attempt)
        if before is not None and attempt > before:  # the run went back to a checkpoint: what followed it is hidden
            write(step=step, session_log=SessionLog(status=SessionLog.START))
        write(step=step, summary=_scalars(values))
        file.flush()
        if not local and time.monotonic() - uploaded >= UPLOAD_SECONDS:
            uploaded = time.monotonic()
            storage.write_bytes(uri, file.getvalue())

    def close(ok: bool) -> None:
        if not local:
            storage.write_bytes(uri, file.getvalue())
        file.close()

    # What earlier files hold from this step on is hidden.
    write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
    if not seconds:
        lines = json.dumps(run["config"], indent=1).splitlines()
        write(step=0, summary=texts.text_pb("config", "\n".join(f"    {line}" for line in lines)))  # (code, in Markdown)
    file.flush()
    return Tracker(log, close)


def _event_writer(file: IO[bytes]) -> Callable[..., None]:
    """Writes an event of the given fields to a new event file."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    records = RecordWriter(file)

    def write(**fields: Any) -> None:
        records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    write(file_version="brain.Event:2")
    return write


def _scalars(values: dict[str, float]) -> Any:
    """Numbers by tag, as an event holds them."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def write_trial(folder: str, name: str, point: dict[str, Any], rows: list[dict], metrics: dict[str, float]) -> None:
    """An event file of a whole run for TensorBoard's HPARAMS and SCALARS: its settings, its rows, and what it came to.

    Args:
        folder: the run's (URI), by which TensorBoard names it.
        name: tells its event file from others; the same one is written over.
        point: settings by path.
        metrics: shown at the last row's step.
    """
    from tensorboard.plugins.hparams import summary_v2 as hparams

    file = io.BytesIO()
    write = _event_writer(file)
    plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in point.items()}
    write(summary=hparams.hparams_pb(plain))
    for row in rows:
        write(step=row["step"], summary=_scalars(tagged(row)))
    write(step=rows[-1]["step"], summary=_scalars({_tag(key): value for key, value in metrics.items()}))
    storage.write_bytes(storage.join(folder, f"events.out.tfevents.0000000000.{name}"), file.getvalue())


def _mlflow(mlflow: ModuleType, config: TrackConfig, output: str, run: dict[str, Any]) -> Tracker:
    """The output's run in MLflow, or a new one. Its params are the settings that it began with: MLflow changes none."""
    client = mlflow.MlflowClient(tracking_uri=config.mlflow)
    held = _remembered(config, output, "mlflow")
    if held:
        run_id = held["id"]
        client.update_run(run_id, status="RUNNING")
    else:
        experiment = client.get_experiment_by_name(config.experiment)
        where = experiment.experiment_id if experiment else client.create_experiment(config.experiment)
        tags = {"mdt_ray.run": run["name"]} | {f"version.{name}": version for name, version in run["versions"].items()}
        run_id = client.create_run(where, run_name=_name(config, output), tags=tags).info.run_id
        params = [mlflow.entities.Param(key, str(value)) for key, value in config_io.flatten(run["config"]).items()]
        for start in range(0, len(params), PARAMS_PER_REQUEST):
            client.log_batch(run_id, params=params[start:start + PARAMS_PER_REQUEST])
        _remember(config, output, "mlflow", run_id)

    def log(step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[mlflow.entities.Metric(tag, value, now, step) for tag, value in values.items()])

    return Tracker(log, lambda ok: client.set_terminated(run_id, "FINISHED" if ok else "FAILED"))


def _wandb(wandb: ModuleType, config: TrackConfig, output: str, run: dict[str, Any]) -> Tracker:
    """The output's run in Weights & Biases, or a new one."""
    team, _, project = config.wandb.rpartition("/")
    held = _remembered(config, output, "wandb")
    folder = Path(storage.resolve(output)[1] if storage.is_local(output) else tempfile.mkdtemp(prefix="wandb-"))
    folder.mkdir(parents=True, exist_ok=True)  # (else its files go to the system's temporary folder)
    opened = wandb.init(entity=team or None, project=project, id=held["id"] if held else uuid.uuid4().hex, resume="allow",
                        name=None if held else _name(config, output), dir=str(folder), config=run["config"],
                        # Neither the process's output nor another run that is open in it is ours.
                        settings=wandb.Settings(console="off", reinit="create_new"))
    if not held:
        _remember(config, output, "wandb", opened.id)
    # Its own step must not fall, and a metric of samples may come late: the x axis is a number of the row.
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")
    return Tracker(lambda step, values: opened.log({"step": step} | values),
                   lambda ok: opened.finish(exit_code=0 if ok else 1))


def _import(package: str, value: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"track.{package} = {value!r}: needs a package that is not installed ({error}); run `pip install "
                         f"mdt-ray[{package}]`, or leave the field empty") from error


def _name(config: TrackConfig, output: str) -> str:
    return config.name or storage.name(output)


def _remembered(config: TrackConfig, output: str, name: str) -> dict[str, str] | None:
    """What `_remember` wrote of this tracker, unless the field has changed since."""
    uri = storage.join(output, TRACKING)
    held = storage.read_json(uri).get(name) if storage.exists(uri) else None
    return held if held and held["at"] == getattr(config, name) else None


def _remember(config: TrackConfig, output: str, name: str, run_id: str) -> None:
    uri = storage.join(output, TRACKING)
    held = storage.read_json(uri) if storage.exists(uri) else {}
    storage.write_json(uri, held | {name: {"at": getattr(config, name), "id": run_id}})
