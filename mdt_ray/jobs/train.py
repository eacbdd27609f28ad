"""Job `train`: latents -> checkpoints, as DDP workers of Ray Train.

Restart is ours: every launch takes the newest checkpoint, also the ones that replace lost workers.
"""

import dataclasses
import logging
import uuid
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer, get_device

from mdt_ray import checkpoints, config_io, run_folder, storage
from mdt_ray.config import TrainConfig
from mdt_ray.data import latents
from mdt_ray.data.latents import Manifest
from mdt_ray.inference import convert
from mdt_ray.jobs import fanout, progress, session
from mdt_ray.training.loop import TrainingDiverged
from mdt_ray.training.run import INIT_FROM, resolve_model, run_rank

logger = logging.getLogger(__name__)
MAX_WORKER_FAILURES = 10
FINAL = (ValueError, TrainingDiverged)
"""Failures that would come back: the workers are not started again."""


def prepare(config: TrainConfig) -> tuple[TrainConfig, Manifest, dict]:
    """The config with absolute paths and a complete model, the latents' manifest, and the content of run.json.

    Raises ValueError for missing or damaged latents, and for a model that does not fit them.
    """
    manifest = latents.open_manifest(config.latents)
    config = dataclasses.replace(config, latents=storage.absolute(config.latents), output=storage.absolute(config.output),
                                 init_from=storage.absolute(config.init_from) if config.init_from else "",
                                 model=resolve_model(config.model, manifest))
    inputs = {"latents": manifest.content}
    if config.init_from:
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
    """Whether a checkpoint of config.num_steps or beyond is there."""
    return checkpoints.steps_done(config.output) >= config.num_steps


def train(config: TrainConfig) -> str:
    """Train to config.num_steps; returns the URI of the newest checkpoint. Does nothing where that is done.

    Raises ValueError as `prepare`, and if the output holds another run or has another writer; what a worker raised, once it
    failed too often.
    """
    config, _, run = prepare(config)
    run_folder.check_identity(config.output, run)
    if not is_finished(config):
        with run_folder.claim(config.output, run) as token:
            session.start()
            if config.init_from and not checkpoints.list_finished(config.output):
                logger.info("starting from %s; %s lists what is taken and what is new", config.init_from,
                            storage.join(config.output, INIT_FROM))
            _fit_with_retries(config, run, token)
    return checkpoints.resolve(config.output)


def _fit_with_retries(config: TrainConfig, run: dict, token: str) -> None:
    """Launch workers until they finish. A lost one (killed, its node gone) costs a relaunch from the newest checkpoint."""
    for failures in range(MAX_WORKER_FAILURES + 1):
        try:
            return _fit(config, run, token)
        except FINAL:
            raise
        except Exception as error:
            if failures == MAX_WORKER_FAILURES:
                raise
            logger.warning("a training worker was lost (%s); going on from the newest checkpoint", error)


def _fit(config: TrainConfig, run: dict, token: str) -> None:
    first = checkpoints.steps_done(config.output)
    with progress.bar(config.num_steps * config.batch_size, "image", "train", first * config.batch_size) as bar:

        def show(row: dict[str, Any]) -> None:
            bar.set_postfix_str(f"step {row['step']}/{config.num_steps} loss {row['loss']:.3f}", refresh=False)
            bar.update(row["images_seen"] - bar.n)

        with progress.watched(show) as mailbox:
            workers = config.workers
            trainer = TorchTrainer(
                _worker,
                train_loop_config={"config": config_io.to_dict(config), "run": run, "mailbox": mailbox,
                                   "token": token},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=workers.num_workers, use_gpu=workers.gpus_per_worker > 0,
                    resources_per_worker={"CPU": workers.cpus_per_worker} |
                                         ({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {})),
                run_config=ray.train.RunConfig(
                    # A used name would make Ray resume from its own snapshot; ours is the only truth.
                    name=f"{run['name']}-{uuid.uuid4().hex[:8]}",
                    storage_path=storage.join(config.output, "ray")))
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise _cause(error) from None
            finally:
                storage.remove(storage.join(config.output, "ray"))


def _cause(error: ray.train.TrainingFailedError) -> BaseException:
    """Why the workers failed: what a user can mend where one of them said so, else the first failure."""
    failures = (getattr(error, "worker_failures", None) or {0: error}).values()
    causes = [fanout.root_cause(failure) for failure in failures]
    return next((c for c in causes if isinstance(c, FINAL)), causes[0])


def _worker(settings: dict[str, Any]) -> None:
    """One DDP rank, inside a Ray Train worker."""
    config = config_io.from_dict(TrainConfig, settings["config"])
    session.settle(config.workers)
    context, mailbox = ray.train.get_context(), settings["mailbox"]
    run_rank(config, latents.open_manifest(config.latents), settings["run"], rank=context.get_world_rank(),
             world_size=context.get_world_size(), device=get_device(),
             report=lambda row: mailbox.put.remote(row),
             may_write=lambda: run_folder.holds(config.output, settings["token"]))
