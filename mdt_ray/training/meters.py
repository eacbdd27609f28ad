"""Sums of the losses between two rows of metrics, kept on the device and added over ranks when a row is due."""

import time

import torch
import torch.distributed as dist


class Meters:
    """Add every step, collect every few: only `collect` waits for the device."""

    def __init__(self, device: torch.device, batch_size: int):
        self.device, self.batch_size = device, batch_size
        self.steps = 0
        self._reset()

    def add(self, losses: dict[str, torch.Tensor], grad_norm: torch.Tensor, found_inf: torch.Tensor) -> None:
        """Per-sample losses (B,) of this rank, and the global gradient norm and skip flag (scalars)."""
        sums = torch.stack([loss.detach().double().sum() for loss in losses.values()])
        self._names = list(losses)
        self._sums = sums if self._sums is None else self._sums + sums
        self._grad_norm += grad_norm.double()
        self._skipped += found_inf
        self._new_steps += 1
        self.steps += 1

    def collect(self) -> dict[str, float]:
        """Means over all images since the last call, and images per second; then start anew."""
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        means = (self._sums / (self._new_steps * self.batch_size)).tolist()
        row = {f"loss_{name}": value for name, value in zip(self._names, means, strict=True)}
        row["loss"] = row.get("loss_full", 0.0) + row.get("loss_masked", 0.0)
        row["grad_norm"] = (self._grad_norm / self._new_steps).item()
        row["skipped_steps"] = int(self._skipped)
        row["images_per_second"] = self._new_steps * self.batch_size / (time.perf_counter() - self._start)
        self._reset()
        return row

    def _reset(self) -> None:
        self._sums: torch.Tensor | None = None
        self._names: list[str] = []
        self._grad_norm = torch.zeros((), dtype=torch.float64, device=self.device)
        self._skipped = torch.zeros((), device=self.device)
        self._new_steps = 0
        self._start = time.perf_counter()
