"""Sums of the losses between two rows of metrics, kept on the device and added over ranks when a row is due."""

import resource
import sys
import time

import torch
import torch.distributed as dist

from mdt_ray.config import NUM_TIMESTEPS, TrainConfig

NUM_QUARTILES = 4
MACHINE_COLUMNS = ("num_workers", "images_per_second", "share_waiting", "memory_gb", "seconds_left")
"""Columns that differ from one run of the same training to the next; all others are equal bit for bit. (A run that was asked
to stop has a row more, of that step, and the next row tells of the steps since.)"""


class Meters:
    """Add every step, collect every few: only `collect` waits for the device."""

    def __init__(self, device: torch.device, config: TrainConfig):
        self.device, self.batch_size = device, config.batch_size
        self.steps = 0
        self.waited = 0.0
        """Seconds spent waiting for batches since the last row."""
        self._reset()

    def add(self, t: torch.Tensor, losses: dict[str, torch.Tensor]) -> None:
        """Timesteps (B,) and per-sample losses (B,) of this rank or of a part of its batch."""
        values = torch.stack([loss.detach().double() for loss in losses.values()])  # (names, B)
        quartile = t * NUM_QUARTILES // NUM_TIMESTEPS  # (B,)
        one_hot = (quartile[:, None] == torch.arange(NUM_QUARTILES, device=t.device)).double()  # (B, 4)
        sums = torch.cat([values @ one_hot, one_hot.sum(0)[None]])  # (names + 1, 4)
        self._names = list(losses)
        self._sums = sums if self._sums is None else self._sums + sums

    def add_step(self, grad_norm: torch.Tensor, found_inf: torch.Tensor) -> None:
        """The global gradient norm and skip flag (scalars) of a step."""
        self._grad_norm += grad_norm.double()
        self._skipped += found_inf
        self._new_steps += 1
        self.steps += 1

    def collect(self, steps_left: int) -> dict[str, float]:
        """Means over all images since the last call, by quartile of t too (q1: least noise); rates; then start anew.

        A quartile without an image has no column. Memory is this rank's: peak on the GPU, else of the process.
        """
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        *sums, counts = self._sums.tolist()  # names x 4, 4
        images = self._new_steps * self.batch_size
        row = {f"loss_{name}": sum(parts) / images for name, parts in zip(self._names, sums, strict=True)}
        row["loss"] = row.get("loss_full", 0.0) + row.get("loss_masked", 0.0)
        for name, parts in zip(self._names, sums, strict=True):
            if name in ("full", "masked"):
                row |= {f"loss_{name}_q{i + 1}": parts[i] / counts[i] for i in range(NUM_QUARTILES) if counts[i]}
        row["grad_norm"] = (self._grad_norm / self._new_steps).item()
        row["skipped_steps"] = int(self._skipped)
        row["num_workers"] = dist.get_world_size() if dist.is_initialized() else 1
        seconds = time.perf_counter() - self._start
        row["images_per_second"] = images / seconds
        row["share_waiting"] = self.waited / seconds
        row["memory_gb"] = peak_memory(self.device) / 1e9
        row["seconds_left"] = steps_left * seconds / self._new_steps
        self._reset()
        return row

    def restart_clock(self) -> None:
        """Leave what happened since the last row out of the rates."""
        self._start, self.waited = time.perf_counter(), 0.0

    def _reset(self) -> None:
        self._sums: torch.Tensor | None = None
        self._names: list[str] = []
        self._grad_norm = torch.zeros((), dtype=torch.float64, device=self.device)
        self._skipped = torch.zeros((), device=self.device)
        self._new_steps = 0
        self.restart_clock()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU, or that this process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
