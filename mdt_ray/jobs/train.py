"""Job `train`: latents -> checkpoints, as DDP workers of Ray Train.

Restart is ours: every launch takes the newest checkpoint, whether workers were lost, asked to stop because their node will
go, or because more fit. So one path does all of it, and it is the path of every resume.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from mdt_ray import checkpoints, config_io, run_folder, storage
from mdt_ray.config import TrainConfig
from mdt_ray.data import latents
from mdt_ray.data.latents import Manifest
from mdt_ray.data.loader import check_flip
from mdt_ray.interrupts import Stopped, Wish, stop_signals
from mdt_ray.jobs import control, fanout, nodes, preflight, previews, progress, session
from mdt_ray.training import samples
from mdt_ray.training.contract import INIT_FROM, METRICS, STACKS, TrainingDiverged, resolve_model, write_metrics
from mdt_ray.training.trackers import open_trackers

logger = logging.getLogger(__name__)
MAX_FAILURES = 10
"""Losses of workers without a new checkpoint in between, after which a run is given up."""
PATIENCE_SECONDS = 15.0
"""How long a launch waits for room for all workers before it takes fewer, where it may."""
RETURN_SECONDS = 5.0
"""Until what workers held that were to start counts as room again, at most."""
FINAL = (ValueError, TrainingDiverged, torch.OutOfMemoryError, storage.NoRoom, run_folder.TakenOver)
"""Failures that would come back: the workers are not started again."""


def prepare(config: TrainConfig) -> tuple[TrainConfig, Manifest, dict]:
    """The config with absolute paths and a complete model, the latents' manifest, and the content of run.json.

    Raises ValueError for latents that are missing, damaged, or lack the mirror images wanted, and for a model that does not
    fit them.
    """
    manifest = latents.open_manifest(config.latents)
    check_flip(config.latents, manifest, config.flip)
    config = dataclasses.replace(config, latents=storage.absolute(config.latents), output=storage.absolute(config.output),
                                 init_from=storage.absolute(config.init_from) if config.init_from else "",
                                 model=resolve_model(config.model, manifest))
    inputs = {"latents": manifest.content}
    if config.init_from:
        from mdt_ray.inference import convert  # it loads the models

        inputs["init_from"] = _begun_with(config) or convert.fingerprint_of(config.init_from)
    return config, manifest, run_folder.describe("train", config, inputs)


def _begun_with(config: TrainConfig) -> str | None:
    """What a run here began with, if it is the same source and there is a checkpoint: the source is needed no more, and may
    have grown or gone."""
    uri = storage.join(config.output, "run.json")
    if not storage.exists(uri) or not checkpoints.list_finished(config.output):
        return None
    held = storage.read_json(uri)
    same = held["config"].get("init_from") == config.init_from
    return held["identity"]["inputs"].get("init_from") if same else None


def is_finished(config: TrainConfig) -> bool:
    """Whether an undamaged checkpoint of config.num_steps or beyond is there. (By their names first: to look for damage
    is to read gigabytes.)"""
    output, num_steps = config.output, config.num_steps
    return checkpoints.newest_step(output) >= num_steps and checkpoints.steps_done(output) >= num_steps


def train(config: TrainConfig, on_row: Callable[[dict], None] = lambda row: None, wish: Wish | None = None,
          above: run_folder.Claim | None = None) -> str:
    """Train to config.num_steps; returns the URI of the newest checkpoint. Does nothing where that is done.

    on_row: gets every row of metrics that is news.
    wish: says when to stop, instead of this process's signals.
    above: a claim of the caller's that covers the output.
    Raises ValueError as `prepare`, and if the output holds another run or has another writer; Stopped after a signal, with
    a checkpoint written; what a worker raised, once it failed too often.
    """
    previews.check(config)
    config, manifest, run = prepare(config)
    run_folder.check_identity(config.output, run)
    finished = is_finished(config)
    if finished:
        _catch_up(config, run, above)
    if not finished or samples.due(config.output, config.sample_every_steps):
        with run_folder.claim(config.output, run, above) as claim:
            listening = stop_signals if wish is None else functools.partial(contextlib.nullcontext, wish)
            _heed(config, session.start_heeding())
            with listening() as wish:
                if above is None:  # else its owner has looked: a trial is not to fail for a node that goes later
                    preflight.check_nodes(config, manifest)
            _heed(config, wish)
            if config.init_from and not checkpoints.list_finished(config.output):
                logger.info("starting from %s; %s lists what is taken and what is new", config.init_from,
                            storage.join(config.output, INIT_FROM))
            first_step = checkpoints.newest_step(config.output)
            if first_step and not finished:
                logger.info("going on from the checkpoint of step %d", first_step)
            with (open_trackers(config.track, config.output, run, first_step) as track, listening() as wish,
                  _shown(config, first_step, track, on_row) as show):
                on_the_way = previews.Previews(config, show)
                try:
                    if not finished:
                        _train_to_the_end(config, run, claim, wish, show, on_the_way)
                    on_the_way.finish(wish)
                finally:
                    on_the_way.cancel()
            write_metrics(config.output, checkpoints.read_metrics(storage.join(config.output, METRICS)))
    return checkpoints.list_finished(config.output)[-1]


def _catch_up(config: TrainConfig, run: dict, above: run_folder.Claim | None) -> None:
    """Write the metrics beside the checkpoints, where a kill came between the last of these, or of samples, and them; and
    remove the lock of a driver that its workers outlived, and what Ray kept for them."""
    uri = storage.join(config.output, METRICS)
    try:
        rows = checkpoints.read_metrics(storage.join(checkpoints.list_finished(config.output)[-1], METRICS))
        written = checkpoints.read_metrics(uri) if storage.exists(uri) else []
    except (FileNotFoundError, ValueError) as error:  # a damaged one, which training passes over
        logger.warning("%s", error)
        return
    if written != samples.with_columns(config.output, rows) or run_folder.is_locked(config.output):
        with run_folder.claim(config.output, run, above) as claim:
            write_metrics(config.output, rows)
            _clear(config.output, claim)


@contextlib.contextmanager
def _shown(config: TrainConfig, first_step: int, track: Callable[[dict], None],
           on_row: Callable[[dict], None]) -> Iterator[Callable[[dict], None]]:
    """What is done with a row of metrics on the driver: the bar, and where it is news the trackers and `on_row`.

    Workers that go on from a checkpoint send the rows after it again.
    """
    newest = (None, first_step)  # attempt, step
    with progress.bar(config.num_steps * config.batch_size, "image", "train", first_step * config.batch_size) as bar:

        def show(row: dict[str, Any]) -> None:
            nonlocal newest
            if "loss" not in row:  # of samples, which come when they are drawn
                return track(row)
            bar.set_postfix_str(f"step {row['step']}/{config.num_steps} loss {row['loss']:.3f}", refresh=False)
            bar.update(row["images_seen"] - bar.n)
            if newest[0] is not None and row["attempt"] > newest[0]:
                logger.warning("gradients were not finite; training went back to the checkpoint before step %d", row["step"])
            if row["attempt"] != newest[0] or row["step"] > newest[1]:
                newest = (row["attempt"], row["step"])
                track(row)
                on_row(row)

        yield show


def _train_to_the_end(config: TrainConfig, run: dict, claim: run_folder.Claim, wish: Wish,
                      on_row: Callable[[dict], None], on_the_way: previews.Previews) -> None:
    """Launch workers until they finish. What ends them before costs a launch from the newest checkpoint."""
    failures, step = 0, checkpoints.newest_step(config.output)
    reason, before, grow_after = None, 0, control.GROW_AFTER_SECONDS
    while True:
        num_workers = _wait_for_room(config, wish)
        if reason == control.GROWS:  # another training may take the room each time, and lose its own to this one
            grow_after = (control.GROW_AFTER_SECONDS if num_workers > before
                          else min(2 * grow_after, control.GROW_AFTER_MOST))
        reason, before = None, num_workers
        stacks = set(storage.list_names(storage.join(config.output, STACKS)))
        try:
            if wish.signum is None:
                reason = _launch(config, run, claim, num_workers, grow_after, wish, on_row, on_the_way.poll)
                if reason is None:
                    return
        except FINAL:
            raise
        except Exception as error:
            newest = checkpoints.newest_step(config.output)
            failures = (0 if newest > step else failures) + (not _was_outrun(error, config, num_workers))
            if failures > MAX_FAILURES:
                raise
            hung = sorted(set(storage.list_names(storage.join(config.output, STACKS))) - stacks)
            logger.warning("a training worker was lost (%s)%s; going on from the checkpoint of step %d",
                           str(error).strip().partition("\n")[0][:300],
                           f"; where it hung, by rank: {storage.join(config.output, STACKS)}" if hung else "", newest)
        step = checkpoints.newest_step(config.output)
        _heed(config, wish)
        if reason is not None:
            logger.warning("%s: starting the workers again from step %d", reason, step)


def _was_outrun(error: Exception, config: TrainConfig, num_workers: int) -> bool:
    """Whether workers did not start because others took their room: no failure, however many wait for the same."""
    if not isinstance(error, WorkerGroupStartupTimeoutError):
        return False
    end = time.monotonic() + RETURN_SECONDS
    while nodes.room_for(config.workers) < num_workers:
        if time.monotonic() > end:
            return True
        time.sleep(control.POLL_SECONDS)
    return False


def _heed(config: TrainConfig, wish: Wish) -> None:
    """Raise Stopped after a signal."""
    if wish.signum is not None:
        found = checkpoints.list_finished(config.output)
        raise Stopped(wish.signum, f"stopped; the newest checkpoint is that of step {checkpoints.step_of(found[-1])}"
                      if found else "stopped before the first checkpoint")


def _wait_for_room(config: TrainConfig, wish: Wish) -> int:
    """Workers to launch: all that are wanted where they fit, after a while as many as fit but min_workers at least."""
    wanted, least = config.workers.num_workers, config.min_workers or config.workers.num_workers
    started = told = time.monotonic()
    with contextlib.closing(nodes.Demand(config.workers, wanted, config.output)) as demand:
        while wish.signum is None:
            room, now = wanted if demand.is_met() else min(nodes.room_for(config.workers), wanted), time.monotonic()
            if room == wanted or (room >= least and now - started > PATIENCE_SECONDS):
                if room < wanted:
                    logger.warning("going on with %d of %d workers: the cluster has no room for more", room, wanted)
                return room
            nodes.release(nodes.orphans())
            demand.ask()
            if now - told > 60:
                told = now
                logger.warning("waiting for room for %d workers; there is some for %d (`ray status` shows what takes it)",
                               least, room)
            time.sleep(control.POLL_SECONDS)
    return wanted


class _Trainer(TorchTrainer):
    """Without Ray's process that outlives the job to free what a lost controller had reserved, which `_fit` does: where the
    driver is killed while that process starts, nothing tells it to look, and it stays for ever."""

    def _create_default_callbacks(self) -> list:
        return [callback for callback in super()._create_default_callbacks()
                if type(callback).__name__ != "PlacementGroupCleanerCallback"]


def _launch(config: TrainConfig, run: dict, claim: run_folder.Claim, num_workers: int, grow_after: float, wish: Wish,
            on_row: Callable[[dict], None], meanwhile: Callable[[], None]) -> str | None:
    """Start workers and wait for them; returns why they were asked to stop, or None where they finished."""
    workers, channel = config.workers, control.open_control()
    have_arrived = control.Arrival(channel, num_workers)
    # Fewer workers own more lanes each: parts in time keep what a worker holds at once, and change nothing but speed.
    parts = math.ceil(config.accumulation * workers.num_workers / num_workers)
    launched = dataclasses.replace(
        config, accumulation=min(parts, config.num_lanes // num_workers), min_workers=0,
        workers=dataclasses.replace(workers, num_workers=num_workers))
    trainer = _Trainer(
        _worker,
        train_loop_config={"config": config_io.to_dict(launched), "run": run, "control": channel, "claim": claim},
        # The watchdog, which says where a rank hangs, comes first; this is for what it cannot see.
        torch_config=TorchConfig(timeout_s=int(2 * config.hang_timeout_s) or 3600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker=nodes.bundle(workers)),
        run_config=ray.train.RunConfig(
            # A used name would make Ray resume from its own snapshot; ours is the only truth.
            name=f"{run['name']}-{uuid.uuid4().hex[:8]}", storage_path=storage.join(config.output, "ray"),
            # Workers that cannot be placed are for us to count again, not for Ray to try without end.
            failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0)))
    try:
        return control.watch(functools.partial(_fit, trainer), channel, config, num_workers, wish, on_row,
                             lambda: meanwhile() if have_arrived() else None, grow_after)
    finally:
        ray.kill(channel)
        _clear(config.output, claim)


def _clear(output: str, claim: run_folder.Claim) -> None:
    """Delete what Ray wrote, but not for who has taken over. What the launch ended with counts more than an error here."""
    try:
        if run_folder.holds(claim):
            storage.remove(storage.join(output, "ray"))
    except OSError as error:
        logger.warning("%s", error)


def _fit(trainer: TorchTrainer) -> None:
    held = nodes.reserved()
    try:
        trainer.fit()
    except (RayActorError, ray.train.ControllerError) as error:
        # Of Ray Train's controller: lost, or failed as its workers began (a host went away). What it had reserved for them
        # would stay reserved. (In a sweep that of trials that started since goes too, and they start again.)
        nodes.release(nodes.reserved() - held)
        raise fanout.root_cause(getattr(error, "controller_failure", error)) from None
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from None


def _cause(error: ray.train.TrainingFailedError) -> BaseException:
    """Why the workers failed: what a user can mend where one of them said so, else the first failure."""
    failures = (getattr(error, "worker_failures", None) or {0: error}).values()
    causes = [fanout.root_cause(failure) for failure in failures]
    return next((c for c in causes if isinstance(c, FINAL)), causes[0])


def _worker(settings: dict[str, Any]) -> None:
    """One DDP rank, inside a Ray Train worker."""
    from mdt_ray.training.run import run_rank  # the models, which driver and controller do without

    config = config_io.from_dict(TrainConfig, settings["config"])
    session.settle(config.workers, config.deterministic)
    rank, channel = ray.train.get_context().get_world_rank(), settings["control"]
    channel.arrive.remote(rank, ray.get_runtime_context().get_node_id())
    run_rank(config, latents.open_manifest(config.latents), settings["run"], rank=rank,
             world_size=ray.train.get_context().get_world_size(), device=get_device(),
             report=lambda row: channel.put.remote(row),
             may_write=lambda: run_folder.holds(settings["claim"]),
             should_stop=control.Asked(channel) if rank == 0 else lambda: False)
