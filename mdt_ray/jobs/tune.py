"""Job `tune`: a grid of training settings, each trained and judged as a trial of Ray Tune.

The ledger is ours: a trial is named by the hash of what it changes and of all it shares; its result.json is written last,
and a trial that has one is never run again.

    trials/<name>/train/          its checkpoints
    trials/<name>/evaluate/       its samples and metrics.json
    trials/<name>/result.json     written last
    results.json                  all trials, best first
"""

import dataclasses
import importlib
import importlib.util
import itertools
import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ray.tune

from mdt_ray import config_io, run_folder, storage
from mdt_ray.config import EvaluateConfig, TrainConfig, TuneConfig, require
from mdt_ray.data import latents
from mdt_ray.evaluation import results
from mdt_ray.jobs import evaluate as evaluating
from mdt_ray.jobs import fanout, progress, session
from mdt_ray.jobs import train as training
from mdt_ray.training.run import run_rank

RESULT = "result.json"


@dataclass(frozen=True)
class Trial:
    """One point of the space, resolved."""

    name: str
    overrides: dict[str, Any]
    folder: str
    train: TrainConfig
    evaluate: EvaluateConfig


def load_space(name: str) -> ModuleType:
    """A space by name (a file of tune_spaces/) or by path. Raises ValueError if there is none."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"space = {name!r}: no such file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    package = importlib.import_module("tune_spaces")
    known = sorted(p.stem for p in Path(package.__path__[0]).glob("*.py") if p.stem != "__init__")
    if name not in known:
        raise ValueError(f"space = {name!r}: no such search space{config_io.suggestion(name, known)}, "
                         "or the path of a .py file")
    return importlib.import_module(f"tune_spaces.{name}")


def grid(space: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of a space's values. Raises ValueError for an empty one."""
    for key, values in space.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"space[{key!r}] = {values!r}: must be a list of at least one value")
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*space.values())]


def tune(config: TuneConfig) -> list[dict[str, Any]]:
    """Run the trials that have no result yet; returns all results, best first.

    Raises ValueError for a bad space or setting before anything starts, and RuntimeError naming the trials that failed.
    """
    config = dataclasses.replace(config, output=storage.absolute(config.output))
    if config.train.workers.num_workers != 1:
        raise ValueError(f"train.workers.num_workers = {config.train.workers.num_workers}: a trial is one process; "
                         "raise max_concurrent_trials instead")
    require(bool(config.evaluate.reference), "evaluate.reference", "", "not given; name real images, or statistics of them")
    space = load_space(config.space)
    points = grid(space.space())
    manifest = latents.open_manifest(config.train.latents)
    run = run_folder.describe("tune", config, {"latents": manifest.content, "space": space.space()} | _shared(config))
    run_folder.check_identity(config.output, run)
    trials = [_trial(config, point) for point in points]
    missing = [t for t in trials if _result(t) is None]
    if missing:
        with run_folder.claim(config.output, run) as token:
            session.start(dashboard=True)
            _run_trials(config, missing, len(trials), token)
    failed = [t.name for t in trials if _result(t) is None]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(trials)} trials have no result ({', '.join(failed)}); run the same "
                           "command again to go on with them")
    metric = objective(config, space)
    ranked = sorted((_result(t) for t in trials), key=lambda r: r["metrics"][metric], reverse=space.mode == "max")
    table = {"metric": metric, "mode": space.mode, "space": space.space(), "trials": ranked}
    uri = storage.join(config.output, "results.json")
    if not storage.exists(uri) or storage.read_json(uri) != json.loads(json.dumps(table)):
        storage.write_json(uri, table)
    return ranked


def objective(config: TuneConfig, space: ModuleType) -> str:
    """Name of the metric that ranks the trials; it carries the number of samples, since it is no full evaluation."""
    return results.metric_name(space.metric, config.evaluate.extractor, config.evaluate.num_samples)


def _trial(config: TuneConfig, overrides: dict[str, Any]) -> Trial:
    changed = config_io.override(config.train, overrides)  # an unknown key stops here
    name = config_io.fingerprint({"overrides": overrides} | _shared(config))[:12]
    folder = storage.join(config.output, "trials", name)
    resolved, _, _ = training.prepare(dataclasses.replace(changed, output=storage.join(folder, "train")))
    judged = dataclasses.replace(config.evaluate, checkpoint=resolved.output, output=storage.join(folder, "evaluate"))
    return Trial(name=name, overrides=overrides, folder=folder, train=resolved, evaluate=judged)


def _shared(config: TuneConfig) -> dict[str, Any]:
    """What all trials have in common and a result depends on: to a trial its number of steps is no operational matter."""
    return {"train": config_io.identity_fields(config.train), "num_steps": config.train.num_steps,
            "evaluate": config_io.identity_fields(config.evaluate)}


def _result(trial: Trial) -> dict[str, Any] | None:
    uri = storage.join(trial.folder, RESULT)
    return storage.read_json(uri) if storage.exists(uri) else None


def _run_trials(config: TuneConfig, trials: list[Trial], total: int, token: str) -> None:
    with progress.bar(total, "trial", "tune", initial=total - len(trials)) as bar:
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(_run_trial, {"CPU": config.train.workers.cpus_per_worker,
                                                 "GPU": config.train.workers.gpus_per_worker}),
            param_space={"settings": ray.tune.grid_search([_plain(config, t, token) for t in trials])},
            tune_config=ray.tune.TuneConfig(max_concurrent_trials=config.max_concurrent_trials,
                                            trial_dirname_creator=lambda trial: trial.trial_id),
            run_config=ray.tune.RunConfig(name=uuid.uuid4().hex[:12], storage_path=storage.join(config.output, "ray"),
                                          verbose=0, callbacks=[_Count(bar)]))
        grid_results = tuner.fit()
    errors = [result.error for result in grid_results if result.error is not None]
    storage.remove(storage.join(config.output, "ray"))
    if errors:
        raise fanout.root_cause(errors[0]) from None


class _Count(ray.tune.Callback):
    """Moves the bar on. Tune pickles its callbacks, and a bar on a terminal cannot be: it stays behind."""

    def __init__(self, bar: Any):
        self.bar = bar

    def on_trial_complete(self, iteration, trials, trial, **info):
        self.bar.update(1)

    def __reduce__(self):
        return ray.tune.Callback, ()


def _plain(config: TuneConfig, trial: Trial, token: str) -> dict[str, Any]:
    return {"name": trial.name, "overrides": trial.overrides, "folder": trial.folder,
            "train": config_io.to_dict(trial.train), "evaluate": config_io.to_dict(trial.evaluate),
            "reference_root": storage.join(config.output, "reference"), "sweep": config.output, "token": token}


def _run_trial(params: dict[str, Any]) -> None:
    """One trial, in a process of Ray Tune: train from its newest checkpoint, evaluate, write the result."""
    settings = params["settings"]
    config, manifest, run = training.prepare(config_io.from_dict(TrainConfig, settings["train"]))
    judged = config_io.from_dict(EvaluateConfig, settings["evaluate"])
    device = session.settle(config.workers)
    started = time.perf_counter()
    # The sweep's claim covers its trials: a trial that outlives a killed sweep must not stop the next sweep's.
    run_folder.record(config.output, run)
    state = run_rank(config, manifest, run, device=device, report=lambda row: ray.tune.report(row),
                     may_write=lambda: run_folder.holds(settings["sweep"], settings["token"]))
    trained = time.perf_counter()
    found = evaluating.evaluate_many([judged], settings["reference_root"], pool=False)[0]
    values = found["metrics"]
    storage.write_json(storage.join(settings["folder"], RESULT), {
        "name": settings["name"], "overrides": settings["overrides"], "metrics": values, "curve": state.history,
        "num_parameters": state.model.num_parameters(), "train_seconds": trained - started,
        "seconds": time.perf_counter() - started})
    ray.tune.report(values)
