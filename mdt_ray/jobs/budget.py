"""What a sweep may use: hours of one run of its command, and hours of GPUs of all runs together, which its folder keeps."""

import time

from mdt_ray import storage
from mdt_ray.config import TuneConfig

SPENT = "spent.json"
WRITE_SECONDS = 30.0
"""What a killed driver forgets at most."""


class Budget:
    """Counts while trials run. Where trials have no GPU, their workers are counted instead."""

    def __init__(self, config: TuneConfig):
        workers = config.train.workers
        self.per_trial = workers.num_workers * (workers.gpus_per_worker or 1)
        self.config, self.uri = config, storage.join(config.output, SPENT)
        self.hours: float = storage.read_json(self.uri)["gpu_hours"] if storage.exists(self.uri) else 0.0
        self.began = self.counted = self.written = time.monotonic()

    def count(self, num_running: int) -> None:
        """Add the time since the last call, in which so many trials ran."""
        now = time.monotonic()
        self.hours += (now - self.counted) / 3600 * num_running * self.per_trial
        self.counted = now
        if num_running and now - self.written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Keep the hours for the next run."""
        self.written = time.monotonic()
        storage.write_json(self.uri, {"gpu_hours": self.hours})

    def used_up(self) -> str | None:
        """Which limit is reached, if one is."""
        limit, most = self.config.time_limit, self.config.max_gpu_hours
        if limit is not None and time.monotonic() - self.began >= limit * 3600:
            return f"time_limit = {limit:g} hours is reached"
        if most is not None and self.hours >= most:
            return f"max_gpu_hours = {most:g} are used"
        return None
