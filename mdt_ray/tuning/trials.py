"""The ledger of a sweep: its trials, each known by its settings, and what became of them.

    trainings/<name>/            what `train` writes; trials that differ in how they are judged share one
    trials/<name>/judged-<step>/ samples' features and metrics.json of a checkpoint
    trials/<name>/result.json    written last: how the trial ended

This is the truth for every restart. What runs trials: jobs/tune.py.
"""

from dataclasses import dataclass
from typing import Any

from mdt_ray import config_io, storage
from mdt_ray.config import EvaluateConfig, TrainConfig
from mdt_ray.tuning.space import Point

RESULT = "result.json"
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

    def result(self) -> dict[str, Any] | None:
        """What became of it: `status`, `point`, `seed`, and `metrics` or the `reason` why there are none; None if it is not
        ended."""
        uri = storage.join(self.folder, RESULT)
        return storage.read_json(uri) if storage.exists(uri) else None

    def end(self, status: str, **facts: Any) -> dict[str, Any]:
        """Write down how it ended; returns that."""
        return _write(self.folder, self.name, status, self.point, self.seed, facts)


def results_in(output: str) -> list[dict[str, Any]]:
    """What became of all trials that a folder knows, by name."""
    root = storage.join(output, "trials")
    uris = [storage.join(root, name, RESULT) for name in sorted(storage.list_names(root))]
    return [storage.read_json(uri) for uri in uris if storage.exists(uri)]


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
