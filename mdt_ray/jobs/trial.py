"""One trial of a sweep: what its point means, and its run in a process of Ray Tune, which trains from the newest checkpoint,
judges, and writes down how it ended.

Where a trial has one worker, that is this process; several are launched as `train` does, and then one that judges with what
one of them had, while this process, which has nothing, waits for them.
"""

import contextlib
import dataclasses
import functools
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.exceptions import TaskCancelledError

from mdt_ray import checkpoints, config_io, run_folder, storage
from mdt_ray.config import LossConfig, ModelConfig, TrainConfig, TuneConfig
from mdt_ray.interrupts import Stopped, Wish
from mdt_ray.jobs import control, fanout, nodes, session
from mdt_ray.jobs import evaluate as evaluating
from mdt_ray.jobs import train as training
from mdt_ray.run_folder import Claim
from mdt_ray.training.contract import METRICS, TrainingDiverged
from mdt_ray.training.trackers import open_trackers, write_trial
from mdt_ray.tuning.lines import file_name
from mdt_ray.tuning.space import Point
from mdt_ray.tuning.trials import FAILED, FINISHED, Trial

logger = logging.getLogger(__name__)
FAILURES = (ValueError, TrainingDiverged, torch.OutOfMemoryError, MemoryError)
"""What is the trial's own fault, and would come again."""
NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What PyTorch says where a CPU's, or a GPU's library's, does not suffice."""
EVALUATE = "evaluate."


def resolve(config: TuneConfig, points: list[Point]) -> list[Trial]:
    """All trials of the points, a seed after the other. Raises ValueError where a point is no valid setting."""
    seeds = range(config.train.seed, config.train.seed + config.num_seeds)
    trials = [resolve_trial(config, point, seed) for seed in seeds for point in points]
    return list({t.name: t for t in trials}.values())


def resolve_trial(config: TuneConfig, point: Point, seed: int) -> Trial:
    """A trial with its folders, and named by all that its result depends on.

    Raises ValueError for an unknown or bad setting, and as `training.prepare`.
    """
    judged = {key.removeprefix(EVALUATE): value for key, value in point.items() if key.startswith(EVALUATE)}
    changes = {key: value for key, value in point.items() if not key.startswith(EVALUATE)}
    train, _, run = training.prepare(config_io.override(config.train, changes | {"seed": seed}))
    if config.equal == "flops":
        train, _, run = training.prepare(at_equal_cost(train, training.prepare(config.train)[0]))
    evaluate = evaluating.absolute(config_io.override(config.evaluate, judged, where="evaluate"))
    # To a trial, its number of steps and the checkpoints judged are no operational matter.
    trained = {"train": run["identity"], "num_steps": train.num_steps, "kept": train.keep_every_steps}
    name = config_io.fingerprint(trained | {"evaluate": config_io.identity_fields(evaluate)})[:12]
    output = storage.join(config.output, "trainings", config_io.fingerprint(trained)[:12])
    return Trial(name=name, point=point, seed=seed, folder=storage.join(config.output, "trials", name),
                 board=storage.join(config.output, "tensorboard", f"{file_name(point)}seed-{seed}"),
                 train=dataclasses.replace(train, output=output), evaluate=evaluate)


def at_equal_cost(train: TrainConfig, base: TrainConfig) -> TrainConfig:
    """`train` with as many steps as take the operations of the base's, and its learning rate's schedule as much longer."""
    ratio = _flops(base.model, base.loss) / _flops(train.model, train.loss) * base.num_steps / train.num_steps
    steps = train.optim.schedule_steps
    optim = dataclasses.replace(train.optim, schedule_steps=steps and round(steps * ratio))
    return dataclasses.replace(train, num_steps=round(train.num_steps * ratio), optim=optim)


@functools.lru_cache
def _flops(model: ModelConfig, loss: LossConfig) -> int:
    """Of an image, forward and backward."""
    from mdt_ray.training import cost as costs  # (it loads the models)

    return costs.count(TrainConfig(model=model, loss=loss), None, on_gpu=False).training_flops


def run(trial: Trial, reference_root: str, claim: Claim, on_row: Callable[[dict[str, Any]], None],
        asked: control.Asked) -> dict[str, Any] | None:
    """Bring a trial to its end; returns its result. Where it has one, only its rows are told again.

    Args:
        reference_root: folder of the real images' features, which trials share.
        claim: of the sweep that started this process.
        on_row: gets every row of metrics, those of an earlier run too.
        asked: where it says to stop, what was done is kept for the next time, and None returned.
    Raises what is not the trial's own fault, such as a lost worker: it goes on the next time.
    """
    known = trial.result()
    if known is not None:
        for row in known.get("curve", []):
            on_row(row)
        return known
    started = time.perf_counter()
    try:
        rows = _train(trial.train, claim, on_row, asked)
        metrics = _judge(trial, reference_root, asked) if trial.train.workers.num_workers == 1 else _judge_apart(
            trial, reference_root, asked)
        judged = [{"step": step, "metrics": found} | _cost(rows, step) for step, found in metrics]
    except Stopped:
        return None
    except Exception as error:
        error = fanout.root_cause(error)
        if not isinstance(error, FAILURES) and not any(words in str(error) for words in NO_MEMORY):
            raise
        logger.warning("trial %s failed: %s", trial.name, error)
        return trial.end(FAILED, reason=f"{type(error).__name__}: {error}", seconds=time.perf_counter() - started)
    last = judged[-1]
    write_trial(trial.board, trial.name, trial.point | {"seed": trial.seed}, rows, last["metrics"])
    return trial.end(FINISHED, metrics=last["metrics"], judged=judged, curve=rows, train_seconds=last["train_seconds"],
                     num_parameters=_num_parameters(trial.train), seconds=time.perf_counter() - started)


def _train(config: TrainConfig, claim: Claim, on_row: Callable[[dict[str, Any]], None], wish: Wish) -> list[dict[str, Any]]:
    """Train to the end; returns the rows of metrics. Raises Stopped, with a checkpoint written."""
    newest = checkpoints.list_finished(config.output)[-1:]
    for row in checkpoints.read_metrics(storage.join(newest[0], METRICS)) if newest else []:
        on_row(row)
    if config.workers.num_workers > 1:
        training.train(config, on_row, wish, claim)
        return checkpoints.read_metrics(storage.join(config.output, METRICS))
    from mdt_ray.training.run import run_rank  # the models, which the sweep's driver does without

    # Nobody draws samples on the way of such a trial, and checkpoints would be kept for them.
    config, manifest, described = training.prepare(dataclasses.replace(config, sample_every_steps=0))
    run_folder.record(config.output, described)
    device = session.settle(config.workers, config.deterministic)
    with contextlib.ExitStack() as stack:
        with storage.outages_told():
            track = stack.enter_context(
                open_trackers(config.track, config.output, described, checkpoints.newest_step(config.output)))

        def told(row: dict[str, Any]) -> None:
            track(row)
            on_row(row)

        state = run_rank(config, manifest, described, device=device, report=told,
                         may_write=lambda: run_folder.holds(claim),
                         should_stop=lambda: wish.signum is not None)
    if state.step < config.num_steps:
        raise Stopped(wish.signum, f"stopped at step {state.step}")
    return state.history


@storage.outages_told()
def _judge(trial: Trial, reference_root: str, wish: Wish) -> list[tuple[int, dict[str, float]]]:
    """Steps and metrics of the checkpoints kept for good, and of the last one."""
    every, last = trial.train.keep_every_steps, trial.train.num_steps
    found = {checkpoints.step_of(uri): uri for uri in checkpoints.list_finished(trial.train.output)}
    steps = [step for step in found if step == last or (every and step and step % every == 0)]
    configs = [dataclasses.replace(trial.evaluate, checkpoint=found[step], output=trial.judged(step),
                                   workers=dataclasses.replace(trial.train.workers, num_workers=1)) for step in steps]
    judged = evaluating.evaluate_many(configs, reference_root, pool=False, wish=wish, known=_opened(reference_root))
    return [(step, metrics["metrics"]) for step, metrics in zip(steps, judged, strict=True)]


def _judge_apart(trial: Trial, reference_root: str, asked: control.Asked) -> list[tuple[int, dict[str, float]]]:
    """The same in a process with what one worker of the training had. Raises Stopped too."""
    workers = trial.train.workers
    nodes.release(nodes.orphans())  # of a lost process of this trial
    task = _judged.options(num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker,
                           scheduling_strategy="DEFAULT")  # not out of what Tune reserved for this process
    running, told = task.remote(trial, reference_root, asked.control), False
    while not ray.wait([running], timeout=control.POLL_SECONDS)[0]:
        if asked() and not told:
            told = True
            ray.cancel(running)  # it may wait for room yet
    with contextlib.suppress(TaskCancelledError):
        if found := ray.get(running):
            return found
    raise Stopped(signal.SIGTERM, "stopped while its samples were drawn")


@ray.remote(max_retries=0)  # of those killed for their memory Ray counts none; Tune tries the trial again
def _judged(trial: Trial, reference_root: str, channel: Any) -> list[tuple[int, dict[str, float]]] | None:
    """None where it was asked to stop."""
    with contextlib.closing(control.Asked(channel)) as asked:
        try:
            return _judge(trial, reference_root, asked)
        except Stopped:
            return None


@functools.cache
def _opened(reference_root: str) -> dict[Any, Any]:
    """What this process has read of the real images: Tune gives it one trial after the other."""
    return {}


def _cost(rows: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Images seen and seconds of training (without validation, checkpoints and starts) until a step."""
    images, seconds = 0, 0.0
    for row in rows:
        if row["step"] <= step and "images_per_second" in row:
            seconds += (row["images_seen"] - images) / row["images_per_second"]
            images = row["images_seen"]
    return {"images_seen": images, "train_seconds": seconds}


def _num_parameters(config: TrainConfig) -> int:
    from mdt_ray.training.step import build_model  # (as in _flops)

    with torch.device("meta"):
        return build_model(config.model, config.loss.passes).num_parameters()
