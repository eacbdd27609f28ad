"""A sweep's trials on Ray Tune: which run at the same time, which are suggested by Optuna, which end early.

Tune knows nothing that the ledger does not: trials that are known already are told again in no time, so that schedulers and
Optuna learn from them. What a trial does: jobs/trial.py.
"""

import contextlib
import functools
import logging
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ray.tune
from ray.exceptions import OutOfMemoryError, RayError
from ray.train._internal.session import get_session
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.trainable.function_trainable import FunctionTrainable, wrap_function

from mdt_ray import run_folder, scratch, storage
from mdt_ray.config import TuneConfig
from mdt_ray.interrupts import Wish
from mdt_ray.jobs import control, fanout, nodes, progress, session, trial
from mdt_ray.jobs.budget import Budget
from mdt_ray.run_folder import Claim
from mdt_ray.training.trackers import write_trial
from mdt_ray.tuning import lines
from mdt_ray.tuning.space import Point, Space
from mdt_ray.tuning.trials import FAILED, STOPPED, Trial, by_training, invalid

logger = logging.getLogger(__name__)
NEARLY_NOTHING = {"memory": 1}
"""What Tune reserves for a trial whose workers reserve their own: it wants something, and a byte is no worker's."""
MAX_LOSSES = 3
"""Times that a trial's process may be lost in one run; its checkpoints make a loss cheap."""
ROUNDS = 2
"""Tune gives up a trial at once, whatever MAX_LOSSES, whose process dies between two trials: such ones get another round."""
REDUCTION = 3
"""One of so many trials goes on at each of ASHA's rungs (arXiv 1810.05934 compares 2 to 4)."""
SIGNAL, PROGRESS, WHOLE = "val_loss", "progress", 1000
"""What trials that end early are chosen by, and how far a trial is, of WHOLE."""
LEFT = "left"
"""Status of a run of Tune that was asked to stop: its trials go on the next time."""
ENDS = "ends"
"""In a result of Tune, what ends the whole sweep: one of ENDING by name, and what it said."""
ENDING = {error.__name__: error for error in (storage.NoRoom, run_folder.TakenOver)}


class Sweep(NamedTuple):
    """What a sweep's runs have in common."""

    config: TuneConfig
    metric: str
    """That ranks the trials."""
    claim: Claim
    """On the output."""
    budget: Budget
    wish: Wish
    """Says when to stop."""


def run_listed(sweep: Sweep, trials: list[Trial]) -> str | None:
    """Run those of the trials that have not ended; returns why they were asked to stop, if they were."""
    for _ in range(ROUNDS):
        open_ = [t for t in trials if t.result() is None]
        groups = by_training(trials if sweep.config.scheduler != "none" else open_)
        reason = _fit(sweep, total=len(trials), known=trials, groups=groups) if open_ else None
        if reason or not open_:
            return reason
    return None


def run_suggested(sweep: Sweep, space: Space, known: list[Trial], invalid_points: list[Point],
                  num_wanted: int) -> str | None:
    """Run the known trials that have not ended, then what Optuna suggests after all of them, up to so many points; returns
    as `run_listed`, or that there were no more points.

    Raises ValueError without Optuna, and OSError where the store has gone.
    """
    config, metric = sweep.config, sweep.metric
    try:
        from mdt_ray.jobs.suggestions import Suggestions
    except ImportError as error:
        raise ValueError(f"search = 'optuna': {error}; pip install 'mdt-ray[optuna]'") from error
    metrics, modes = [metric], [space.mode]
    if config.cost != "none":
        metrics, modes = [metric, config.cost], [space.mode, "min"]
    # The same seed again would suggest the same points again.
    points = [t.point for t in known] + invalid_points
    suggestions = Suggestions(space, metrics, modes, points, config.train.seed + len(points),
                              functools.partial(_training_of, config))  # (Tune pickles it)
    reason = _fit(sweep, total=num_wanted, known=known, suggestions=suggestions)
    if suggestions.failure:
        raise suggestions.failure
    return reason or ("the space has no other points" if suggestions.exhausted else None)


def _training_of(config: TuneConfig, point: Point) -> str | None:
    """The folder that a point's training writes to; None where nothing is to be trained: the trial has ended, or is no valid
    setting."""
    try:
        with storage.outages_told():
            found = trial.resolve_trial(config, point, config.train.seed)
    except ValueError:
        return None
    return None if found.result() else found.train.output


def _fit(sweep: Sweep, *, total: int, known: list[Trial], groups: Sequence[list[Trial]] = (),
         suggestions: Any = None) -> str | None:
    """Run Tune to its end, whatever becomes of single trials: over groups, or over what is suggested."""
    config, channel = sweep.config, control.open_control()
    workers, num_runs = config.train.workers, len(groups) or total
    concurrent = min(config.max_concurrent_trials or max(session.room(workers) // workers.num_workers, 1), num_runs)
    takes = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
    ended = {t.name for t in known if t.result() is not None}
    # Tune's own files are of no use to anybody else. It unpickles errors that it finds there, so they are not in a bucket.
    own = scratch.new_path()
    source = suggestions or BasicVariantGenerator(max_concurrent=concurrent)
    with progress.bar(total, "trial", "tune", initial=len(ended)) as bar:
        ledger = _Ledger(sweep, bar, groups, ended)
        tuner = ray.tune.Tuner(
            _patient(ray.tune.with_resources(
                ray.tune.with_parameters(_run, config=config, groups=groups, claim=sweep.claim, channel=channel),
                takes if workers.num_workers == 1 else NEARLY_NOTHING)),
            param_space={"group": ray.tune.grid_search(list(range(len(groups))))} if groups else None,
            tune_config=ray.tune.TuneConfig(
                search_alg=source, num_samples=1 if groups else total, scheduler=_scheduler(config),
                max_concurrent_trials=concurrent if suggestions else None,
                # (Of a trial that is ended early a step or a checkpoint may still run, and Tune has no patience with that.)
                reuse_actors=config.scheduler == "none",
                trial_dirname_creator=lambda found: found.trial_id),
            run_config=ray.tune.RunConfig(
                name=uuid.uuid4().hex[:12], storage_path=str(own), verbose=0,
                failure_config=ray.tune.FailureConfig(max_failures=MAX_LOSSES),
                callbacks=[ledger]))

        def fit() -> None:
            tuner.fit()
            if ledger.ends:
                kind, text = ledger.ends
                raise ENDING[kind](text)
            for params, error in ledger.lost:
                _give_up(_trials_of(params, config, groups), fanout.root_cause(error))

        def meanwhile() -> str | None:
            sweep.budget.count(len(ledger.running))
            used_up = sweep.budget.used_up()
            if used_up or ledger.ends or sweep.wish.signum is not None:
                source.set_finished()  # else all others would be started, to be told to stop
            return used_up

        try:
            return control.watch(fit, channel, config.train, workers.num_workers, sweep.wish, ledger.on_row, meanwhile)
        finally:
            ray.kill(channel)
            scratch.discard(own)
            if run_folder.holds(sweep.claim):
                sweep.budget.write()


def _give_up(trials: list[Trial], error: BaseException) -> None:
    """After MAX_LOSSES: a trial has failed whose processes were killed for their memory, or raised what is not for want of a
    process or a file. Others go on the next time."""
    elsewhere = isinstance(error, OSError | RayError) and not isinstance(error, OutOfMemoryError)
    for t in trials:
        if t.result() is None and not elsewhere:
            t.end(FAILED, reason=f"{type(error).__name__}: {error}")
        else:
            logger.warning("trial %s did not end: %s", t.name, error)


def _scheduler(config: TuneConfig) -> TrialScheduler:
    shared = {"time_attr": PROGRESS, "metric": SIGNAL, "mode": "min", "grace_period": int(config.grace_share * WHOLE)}
    if config.scheduler == "asha":
        # (stop_last_trials would end a trial when it is trained, and before it is judged.)
        return AsyncHyperBandScheduler(**shared, max_t=WHOLE, reduction_factor=REDUCTION, stop_last_trials=False)
    return _Median(**shared, min_time_slice=float("inf")) if config.scheduler == "median" else FIFOScheduler()


class _Median(MedianStoppingRule):
    """That of Tune, which would count on every trial to end with a loss. (With a `min_time_slice` it would never pause one.)
    """

    def on_trial_complete(self, tune_controller, trial, result):
        if SIGNAL in result and PROGRESS in result:
            super().on_trial_complete(tune_controller, trial, result)


def _trials_of(params: dict[str, Any], config: TuneConfig, groups: Sequence[list[Trial]]) -> list[Trial]:
    """What a run of Tune stands for: trials that share a training, or a suggested point."""
    return groups[params["group"]] if groups else [trial.resolve_trial(config, dict(params), config.train.seed)]


class _Ledger(ray.tune.Callback):
    """Writes down which trials were ended early, and shows on the terminal what runs and what ended. Tune pickles its
    callbacks, and a bar on a terminal cannot be: it stays behind."""

    def __init__(self, sweep: Sweep, bar: Any, groups: Sequence[list[Trial]], told: set[str]):
        self.bar, self.config, self.metric, self.groups = bar, sweep.config, sweep.metric, groups
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.running: set[str] = set()
        """Runs of Tune."""
        self.lost: list[tuple[dict[str, Any], Exception]] = []
        """Parameters of runs that Tune gave up, and why."""
        self.ends: tuple[str, str] | None = None
        """Why the sweep ends, as a trial said: of ENDING."""
        self.steps: dict[str, str] = {}
        """How far the trials are that train now, by name."""
        self.keys: list[str] = []
        """The columns of the table, once it is begun."""
        self.told = told
        """Names of trials that have their line, or had it in an earlier run."""

    def on_row(self, row: dict[str, Any]) -> None:
        if row["trial"] in self.told:
            return
        self.steps[row["trial"]] = f"{row['point']}: step {row['step']} loss {row['loss']:.3f}"
        self.bar.set_postfix_str("; ".join(self.steps.values()), refresh=False)
        self.bar.update(0)  # which shows it where the last line is old enough

    def on_trial_start(self, iteration, trials, trial, **info):
        self.running.add(trial.trial_id)
        self.rows.pop(trial.trial_id, None)  # one that was lost tells them again

    def on_trial_error(self, iteration, trials, trial, **info):
        self.running.discard(trial.trial_id)
        with contextlib.suppress(ValueError, OSError):
            for t in _trials_of(trial.config, self.config, self.groups):
                nodes.drop_demand(t.train.output)
        self.lost.append((trial.config, trial.get_pickled_error() or trial.get_error() or RuntimeError("process lost")))

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.rows[trial.trial_id] += [result["row"]] if "row" in result else []

    def on_trial_complete(self, iteration, trials, trial, **info):
        self.running.discard(trial.trial_id)
        self.ends = trial.last_result.get(ENDS, self.ends)
        try:
            ended = _trials_of(trial.config, self.config, self.groups)
        except ValueError:
            self.bar.update()
            return
        for t in ended:
            self.steps.pop(t.name, None)
            if t.name in self.told:
                continue
            result = t.result()
            if result is None and trial.last_result.get("status") == LEFT:
                continue
            if result is None:
                rows = self.rows[trial.trial_id]
                if rows:
                    write_trial(t.board, t.name, t.point | {"seed": t.seed}, rows, {})
                result = t.end(STOPPED, curve=rows, reason=f"{self.config.scheduler}: its {SIGNAL} was among the worse at "
                                                           f"step {rows[-1]['step']}" if rows else self.config.scheduler)
            self._tell(result)

    def _tell(self, result: dict[str, Any]) -> None:
        self.told.add(result["name"])
        self.bar.update()
        if not self.keys:
            self.keys = list(result["point"])
            self.bar.write(lines.header(self.keys, self.metric), file=sys.stderr)
        self.bar.write(lines.line(result, self.keys, self.metric), file=sys.stderr)

    def __reduce__(self):
        return ray.tune.Callback, ()


def _patient(function: Callable[[dict[str, Any]], None]) -> type[FunctionTrainable]:
    """What Tune makes of a function, a class of processes; but where a trial is ended early, its process ends when the
    function has. At once, Ray Train's controller would end with it, and what that had reserved stay reserved."""
    class ImplicitFunc(wrap_function(function)):
        def cleanup(self) -> None:
            get_session().finish()
            super().cleanup()

    return ImplicitFunc


def _run(params: dict[str, Any], config: TuneConfig, groups: Sequence[list[Trial]], claim: Claim, channel: Any) -> None:
    """In a process of Ray Tune: the trials that a run of it stands for. Some errors end the sweep: Tune would try again."""
    try:
        _run_trials(params, config, groups, claim, channel)
    except Exception as error:
        error = fanout.root_cause(error)
        if not isinstance(error, tuple(ENDING.values())):
            raise
        channel.ask_to_stop.remote()
        ray.tune.report({"status": LEFT, ENDS: (type(error).__name__, str(error))})


def _run_trials(params: dict[str, Any], config: TuneConfig, groups: Sequence[list[Trial]], claim: Claim,
                channel: Any) -> None:
    if ray.get(channel.asked.remote()):
        return ray.tune.report({"status": LEFT})
    try:
        with storage.outages_told():
            here = _trials_of(params, config, groups)
    except ValueError as error:
        invalid(config.output, dict(params), config.train.seed, str(error))
        return ray.tune.report({"status": FAILED})
    if not groups:
        here[0].begin()
    reference = storage.join(config.output, "reference")
    with contextlib.closing(control.Asked(channel)) as asked:
        for t in here:
            # (Those after the first one find the training done, and its rows told. It is not ended early if some trial of it
            # is left to judge.)
            told = t is here[0] and (t.result() is None or all(one.result() is not None for one in here))
            on_row = functools.partial(_report, t, channel) if told else lambda row: None
            result = trial.run(t, reference, claim, on_row, asked)
            if result is None:
                return ray.tune.report({"status": LEFT})
            _report_end(result)


def _report_end(result: dict[str, Any]) -> None:
    """The metrics and costs of a trial that ended, for Optuna and the scheduler."""
    costs = {name: result[name] for name in ("train_seconds", "num_parameters") if name in result}
    signal = next((row[SIGNAL] for row in reversed(result.get("curve", [])) if SIGNAL in row), None)
    ray.tune.report(result.get("metrics", {}) | costs | {"status": result["status"], PROGRESS: WHOLE}
                    | ({SIGNAL: signal} if signal is not None else {}))


def _report(t: Trial, channel: Any, row: dict[str, Any]) -> None:
    """A row for the terminal, and for the scheduler where it has what that goes by. The last one comes with the metrics: a
    trained trial is not ended before it is judged."""
    channel.put.remote({"trial": t.name, "point": lines.named(t.point), "step": row["step"], "loss": row["loss"]})
    if SIGNAL in row and row["step"] < t.train.num_steps:
        ray.tune.report({PROGRESS: WHOLE * row["step"] // t.train.num_steps, SIGNAL: row[SIGNAL], "row": row})
