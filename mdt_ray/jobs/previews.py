"""Samples of a training run on the way, every few steps: a picture and metrics, by a task beside training, which goes on.

    samples/step-<step>/            chunks and metrics.json, as `evaluate` writes them
    samples/step-<step>/grid.png
    samples/step-<step>/preview.json    the columns for the step's row of metrics, or why there are none; written last
    samples/reference-<hash>/       the real images' features, computed once
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from mdt_ray import checkpoints, config_io, storage
from mdt_ray.config import EvaluateConfig, TrainConfig
from mdt_ray.data import picture_sets
from mdt_ray.evaluation import chunks
from mdt_ray.inference.sampler import Sampler, labels_of
from mdt_ray.interrupts import Stopped, Wish
from mdt_ray.jobs import fanout, session
from mdt_ray.jobs.evaluate import evaluate_many
from mdt_ray.training.samples import PREVIEW, SAMPLES, due, folder_of

logger = logging.getLogger(__name__)
LOOK_SECONDS = 5.0
COLUMNS = 8
"""Of the picture."""
MAX_LOSSES = 2
"""Of a task's process, after which a step has no samples."""


def check(config: TrainConfig) -> None:
    """Raise ValueError where the previews that are asked for could not be made."""
    if config.sample_every_steps and config.samples.reference:
        picture_sets.check(config.samples.reference)


class Previews:
    """Starts a task for each checkpoint that is due, one at a time, and hands on what it found."""

    def __init__(self, config: TrainConfig, on_row: Callable[[dict[str, Any]], None]):
        self.config, self.on_row = config, on_row
        self._task: tuple[int, ray.ObjectRef] | None = None
        self._looked = 0.0
        self._losses = 0

    def poll(self) -> None:
        """Look after the running task, or for the next. Returns at once."""
        if self._task is not None and ray.wait([self._task[1]], timeout=0)[0]:
            self._collect()
        if self._task is None and time.monotonic() - self._looked > LOOK_SECONDS:
            self._start()
            self._looked = time.monotonic()

    def finish(self, wish: Wish) -> None:
        """Make all that are due, and wait for them. Raises Stopped after a signal."""
        while self._task is not None or self._start():
            if wish.signum is not None:
                step, _ = self._task
                raise Stopped(wish.signum, f"stopped; training is done, the samples of step {step} are not")
            if ray.wait([self._task[1]], timeout=0.5)[0]:
                self._collect()

    def cancel(self) -> None:
        """End the running task; the next start of the run makes it again."""
        if self._task is not None:
            ray.cancel(self._task[1], force=True)
            self._task = None

    def _start(self) -> bool:
        steps = due(self.config.output, self.config.sample_every_steps)
        if not steps:
            return False
        workers = self.config.samples.workers
        task = _preview.options(num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker,
                                scheduling_strategy="DEFAULT")  # not out of what Tune reserved for a trial's process
        self._task = steps[0], task.remote(config_io.to_dict(self.config), steps[0])
        return True

    def _collect(self) -> None:
        step, task = self._task
        self._task = None
        try:
            columns, error = ray.get(task), None
        except RayError as failure:
            if not isinstance(failure, RayTaskError) and self._losses < MAX_LOSSES:
                self._losses += 1
                return logger.warning("the samples of step %d are drawn again (%s)", step, failure)
            columns, error = {}, str(fanout.root_cause(failure))
            logger.warning("no samples of step %d (%s); training goes on", step, error)
        self._losses = 0
        storage.write_json(storage.join(folder_of(self.config.output, step), PREVIEW), {"columns": columns, "error": error})
        if columns:
            self.on_row({"step": step, "images_seen": step * self.config.batch_size, **columns})


@ray.remote(max_retries=0)  # of those killed for their memory Ray counts none
def _preview(plain: dict[str, Any], step: int) -> dict[str, float]:
    """Draw and measure; returns columns whose names carry the extractor and the number of samples, as a sweep's do."""
    from mdt_ray.report import figures  # loads matplotlib: not in every process that trains

    config = config_io.from_dict(TrainConfig, plain)
    judged = dataclasses.replace(config.samples, output=folder_of(config.output, step), checkpoint=storage.join(
        config.output, checkpoints.CHECKPOINTS, checkpoints.name(step)))
    pictures, columns = _measured(judged, config) if judged.reference else (_drawn(judged), {})
    rows = [pictures[first:first + COLUMNS] for first in range(0, len(pictures), COLUMNS)]
    labels = [str(COLUMNS * row) for row in range(len(rows))]
    if rows:
        storage.write_bytes(storage.join(judged.output, "grid.png"), figures.grid(rows, labels))
    return columns


def _measured(judged: EvaluateConfig, config: TrainConfig) -> tuple[np.ndarray, dict[str, float]]:
    found = evaluate_many([judged], storage.join(config.output, SAMPLES), pool=False)[0]
    return chunks.kept_images(chunks.uris_of(judged), judged.keep_images)[0], found["metrics"]


def _drawn(judged: EvaluateConfig) -> np.ndarray:
    """Without real images there is nothing to measure: just the pictures, (n, H, W, 3) uint8."""
    sampler = Sampler(judged.checkpoint, judged.sampling, session.settle(judged.workers))
    labels = labels_of(0, judged.keep_images, sampler.num_classes, judged.labels, judged.seed)
    return sampler.draw(0, labels, judged.seed).permute(0, 2, 3, 1).numpy()
