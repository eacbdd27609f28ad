"""A sweep's trials on Ray Tune: which run at the same time, which are suggested by Optuna, which end early.

Tune knows nothing that the ledger does not: trials that are known already are told again in no time, so that schedulers and
Optuna learn from them. What a trial does: jobs/trial.py.
"""

import functools
import logging
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import ray.tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from mdt_ray import run_folder, storage
from mdt_ray.config import TuneConfig
from mdt_ray.jobs import fanout, nodes, progress, trial
from mdt_ray.tuning.space import Space
from mdt_ray.tuning.trials import FAILED, STOPPED, Trial, by_training, invalid, results_in

logger = logging.getLogger(__name__)
DRIVER_CPUS = 0.1
"""What Tune reserves for a trial whose workers reserve their own."""
MAX_LOSSES = 3
"""Times that a trial's process may be lost in one run; its checkpoints make a loss cheap."""
REDUCTION = 3
"""One of so many trials goes on at each of ASHA's rungs (arXiv 1810.05934 compares 2 to 4)."""
SIGNAL, PROGRESS, WHOLE = "val_loss", "progress", 1000
"""What trials that end early are chosen by, and how far a trial is, of WHOLE."""


def run_listed(config: TuneConfig, trials: list[Trial], token: str) -> None:
    """Run those of the trials that have not ended."""
    open_ = [t for t in trials if t.result() is None]
    groups = by_training(trials if config.scheduler != "none" else open_)
    _fit(config, token, total=len(trials), initial=len(trials) - len(open_), groups=groups)


def run_suggested(config: TuneConfig, space: Space, known: list[Trial], metric: str, token: str) -> None:
    """Run what Optuna suggests after what is known, up to config.max_trials in all. Raises ValueError without Optuna."""
    try:
        from mdt_ray.jobs.suggestions import Suggestions
    except ImportError as error:
        raise ValueError(f"search = 'optuna': {error}; pip install 'mdt-ray[optuna]'") from error
    metrics, modes = [metric], [space.mode]
    if config.cost != "none":
        metrics, modes = [metric, config.cost], [space.mode, "min"]
    domains = {key: ray.tune.choice(value) if isinstance(value, list) else value for key, value in space.values.items()}
    # The same seed again would suggest the same points again.
    seed = config.train.seed + len(results_in(config.output))
    suggestions = Suggestions(domains, metrics, modes, [t.point for t in known], seed)
    _fit(config, token, total=config.max_trials, initial=0, suggestions=suggestions)


def _fit(config: TuneConfig, token: str, *, total: int, initial: int, groups: Sequence[list[Trial]] = (),
         suggestions: Any = None) -> None:
    """Run Tune to its end, whatever becomes of single trials: over groups, or over what is suggested."""
    workers, num_runs = config.train.workers, len(groups) or total
    room = sum(nodes.num_fitting(node["Resources"], workers) for node in ray.nodes() if node["Alive"])
    concurrent = min(config.max_concurrent_trials or max(room // workers.num_workers, 1), num_runs)
    takes = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
    with progress.bar(total, "trial", "tune", initial=initial) as bar:
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(
                ray.tune.with_parameters(_run, config=config, groups=groups, token=token),
                takes if workers.num_workers == 1 else {"CPU": DRIVER_CPUS}),
            param_space={"group": ray.tune.grid_search(list(range(len(groups))))} if groups else None,
            tune_config=ray.tune.TuneConfig(
                search_alg=suggestions, num_samples=1 if groups else total, scheduler=_scheduler(config),
                max_concurrent_trials=concurrent, reuse_actors=True,
                trial_dirname_creator=lambda found: found.trial_id),
            run_config=ray.tune.RunConfig(
                name=uuid.uuid4().hex[:12], storage_path=storage.join(config.output, "ray"), verbose=0,
                failure_config=ray.tune.FailureConfig(max_failures=MAX_LOSSES),
                callbacks=[_Ledger(bar, config, groups)]))
        try:
            found = tuner.fit()
        finally:
            storage.remove(storage.join(config.output, "ray"))
    for error in (result.error for result in found if result.error is not None):
        logger.warning("a trial did not end: %s", fanout.root_cause(error))


def _scheduler(config: TuneConfig) -> TrialScheduler:
    shared = {"time_attr": PROGRESS, "metric": SIGNAL, "mode": "min", "grace_period": int(config.grace_share * WHOLE)}
    if config.scheduler == "asha":
        # (stop_last_trials would end a trial when it is trained, and before it is judged.)
        return AsyncHyperBandScheduler(**shared, max_t=WHOLE, reduction_factor=REDUCTION, stop_last_trials=False)
    return MedianStoppingRule(**shared) if config.scheduler == "median" else FIFOScheduler()


def _trials_of(params: dict[str, Any], config: TuneConfig, groups: Sequence[list[Trial]]) -> list[Trial]:
    """What a run of Tune stands for: trials that share a training, or a suggested point."""
    return groups[params["group"]] if groups else [trial.resolve_trial(config, dict(params), config.train.seed)]


class _Ledger(ray.tune.Callback):
    """Writes down which trials were ended early, and moves the bar on. Tune pickles its callbacks, and a bar on a terminal
    cannot be: it stays behind."""

    def __init__(self, bar: Any, config: TuneConfig, groups: Sequence[list[Trial]]):
        self.bar, self.config, self.groups = bar, config, groups
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.rows[trial.trial_id] += [result["row"]] if "row" in result else []

    def on_trial_complete(self, iteration, trials, trial, **info):
        try:
            ended = _trials_of(trial.config, self.config, self.groups)
        except ValueError:
            return
        for t in ended:
            if t.result() is None:
                rows = self.rows[trial.trial_id]
                t.end(STOPPED, curve=rows, reason=f"{self.config.scheduler}: its {SIGNAL} was among the worse at step "
                                                  f"{rows[-1]['step']}" if rows else self.config.scheduler)
        self.bar.update(len(ended))

    def __reduce__(self):
        return ray.tune.Callback, ()


def _run(params: dict[str, Any], config: TuneConfig, groups: Sequence[list[Trial]], token: str) -> None:
    """In a process of Ray Tune: the trials that a run of it stands for."""
    def may_write() -> bool:
        return run_folder.holds(config.output, token)

    try:
        here = _trials_of(params, config, groups)
    except ValueError as error:
        invalid(config.output, dict(params), config.train.seed, str(error))
        return ray.tune.report({"status": FAILED})
    reference = storage.join(config.output, "reference")
    for t in here:
        # (Those after the first one find the training done, and its rows told.)
        result = trial.run(t, reference, may_write, functools.partial(_report, t) if t is here[0] else lambda row: None)
        costs = {name: result[name] for name in ("train_seconds", "num_parameters") if name in result}
        signal = next((row[SIGNAL] for row in reversed(result.get("curve", [])) if SIGNAL in row), None)
        ray.tune.report(result.get("metrics", {}) | costs | {"status": result["status"], PROGRESS: WHOLE}
                        | ({SIGNAL: signal} if signal is not None else {}))


def _report(t: Trial, row: dict[str, Any]) -> None:
    """A row that the scheduler goes by. The last one comes with the metrics: a trained trial is not ended before it is
    judged."""
    if SIGNAL in row and row["step"] < t.train.num_steps:
        ray.tune.report({PROGRESS: WHOLE * row["step"] // t.train.num_steps, SIGNAL: row[SIGNAL], "row": row})
