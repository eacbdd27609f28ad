"""The ledger of a sweep: its trials, each known by its settings, and what became of them.

    trainings/<name>/               what `train` writes; trials that differ in how they are judged share one
    trials/<name>/judged-<step>/    samples' features and metrics.json of a checkpoint
    tensorboard/<point and seed>/   its settings, rows and metrics for TensorBoard
    trials/<name>/begun.json        of a suggested point, which nothing else knows: written first
    trials/<name>/result.json       written last: how the trial ended

This is the truth for every restart. What runs trials: jobs/tune.py.
"""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mdt_ray import config_io, storage
from mdt_ray.config import EvaluateConfig, TrainConfig
from mdt_ray.tuning.space import Point

RESULT, BEGUN = "result.json", "begun.json"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
"""How a trial ends. One without a result is not ended: the next run goes on with it."""
INVALID = "invalid-"
"""Begins the name of a suggested point that is no valid setting."""


@dataclass(frozen=True)
class Trial:
    """A point of the space with a seed, resolved."""

    name: str
    """12 hex digits of all that its result depends on."""
    point: Point
    seed: int
    train: TrainConfig
    evaluate: EvaluateConfig
    folder: str
    board: str
    """Folder of what TensorBoard shows of it, with a name for people."""

    def result(self) -> dict[str, Any] | None:
        """What became of it: `status`, `point`, `seed`, and `metrics` or the `reason` why there are none; None if it is not
        ended."""
        uri = storage.join(self.folder, RESULT)
        return storage.read_json(uri) if storage.exists(uri) else None

    def judged(self, step: int) -> str:
        """Folder of the evaluation of its checkpoint of that step."""
        return storage.join(self.folder, f"judged-{step}")

    def begin(self) -> None:
        """Write down what it is, before it starts."""
        uri = storage.join(self.folder, BEGUN)
        if not storage.exists(uri):
            storage.write_json(uri, {"name": self.name, "point": self.point, "seed": self.seed})

    def end(self, status: str, **facts: Any) -> dict[str, Any]:
        """Write down how it ended; returns that."""
        return _write(self.folder, self.name, status, self.point, self.seed, facts)


def begun_in(output: str) -> list[dict[str, Any]]:
    """`name`, `point` and `seed` of all trials that a folder knows, by name, and of those that ended what became of them."""
    root, found = storage.join(output, "trials"), []
    for name in sorted(storage.list_names(root)):
        uris = [storage.join(root, name, file) for file in (RESULT, BEGUN)]
        found += [storage.read_json(uri) for uri in uris if storage.exists(uri)][:1]
    return found


def as_table(results: list[dict[str, Any]]) -> pa.Table:
    """A row for each trial that ended: what it is, its settings by path, its metrics and what it cost."""
    costs = ("num_parameters", "train_seconds", "seconds", "reason")
    rows = [{key: result[key] for key in ("name", "status", "seed")} | result["point"] | result.get("metrics", {})
            | {key: row[key] for row in result.get("curve", [])[-1:] for key in ("step", "loss")}
            | {key: result.get(key) for key in costs} for result in results]
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    return pa.table({key: _column(values) for key, values in columns.items()})


def _column(values: list[Any]) -> pa.Array:
    plain = [json.dumps(value) if isinstance(value, list | tuple | dict) else value for value in values]
    try:
        return pa.array(plain)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # numbers and words
        return pa.array([None if value is None else str(value) for value in plain])


def invalid(output: str, point: Point, seed: int, reason: str) -> None:
    """Write down a point that is no valid setting, and so no trial."""
    name = INVALID + config_io.fingerprint([point, seed])[:12]
    _write(storage.join(output, "trials", name), name, FAILED, point, seed, {"reason": reason})


def _write(folder: str, name: str, status: str, point: Point, seed: int, facts: dict[str, Any]) -> dict[str, Any]:
    result = {"name": name, "status": status, "point": point, "seed": seed} | facts
    storage.write_json(storage.join(folder, RESULT), result)
    return result


def by_training(trials: list[Trial]) -> list[list[Trial]]:
    """Trials that share a training together, in order."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.train.output, []).append(trial)
    return list(groups.values())
