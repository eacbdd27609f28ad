"""The loss on held-out images with noise that never changes: far less noisy than the training loss, and comparable over
steps and between runs on the same latents. Not a measure of samples: that is evaluation/.

B images, C latent channels, h x w latent size.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mdt_ray.config import NUM_TIMESTEPS
from mdt_ray.data.latent_reader import LatentReader
from mdt_ray.data.latents import Manifest
from mdt_ray.data.order import stream_seed
from mdt_ray.diffusion import q_sample, training_losses

NUM_LEVELS = 8
TIMESTEPS = tuple(round((i + 0.5) * NUM_TIMESTEPS / NUM_LEVELS) for i in range(NUM_LEVELS))
"""The middles of eight equal parts of 0..999: 62, 188, ..., 938."""
MAX_IMAGES = 2048
"""Enough for a standard error of the mean well below what 1,000 steps change; more only cost time."""
BATCH_SIZE = 64


class Validation:
    """The held-out images of this rank, read once, and their loss.

    Where the latents hold out none, `num_images` is 0 and there is nothing to call.
    """

    def __init__(self, folder: str, manifest: Manifest, rank: int, world_size: int, device: torch.device,
                 autocast_dtype: torch.dtype | None):
        self.device, self.autocast_dtype = device, autocast_dtype
        reader = LatentReader(folder, manifest, max_groups=1, split="validation")
        count = sum(reader.group_sizes)
        self.num_images = min(count, MAX_IMAGES)
        spread = np.linspace(0, count - 1, self.num_images).round().astype(np.int64) if count else np.zeros(0, np.int64)
        mine = spread[rank::world_size]
        moments, labels = reader.read(mine)
        self.mean, self.std = (torch.from_numpy(moments[:, i]) for i in range(2))  # (B, C, h, w) float16
        self.labels, self.numbers = torch.from_numpy(labels), mine.tolist()
        self.scale, self.shift = manifest.vae["scale"], manifest.vae["shift"]

    @torch.no_grad()
    def loss(self, model: nn.Module, beat: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Columns `val_loss` and `val_loss_t062`, ...: mean loss (mse + vb) of the full pass over all ranks' images, over
        TIMESTEPS and at each. Every rank must call it. `beat` is called now and then."""
        sums = torch.zeros(NUM_LEVELS, dtype=torch.float64, device=self.device)
        for first in range(0, len(self.numbers), BATCH_SIZE):
            beat()
            x_0, eps, y = self._batch(slice(first, first + BATCH_SIZE))
            for level, timestep in enumerate(TIMESTEPS):
                t = torch.full((len(x_0),), timestep, device=self.device)
                x_t = q_sample(x_0, t, eps[:, level])  # (B, C, h, w)
                with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                    output = model(x_t, t, y)  # (B, 2C, h, w)
                sums[level] += training_losses(output, x_0, x_t, eps[:, level], t, None)["loss"].double().sum()
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = (sums / self.num_images).tolist()
        return {"val_loss": sum(means) / NUM_LEVELS} | {
            f"val_loss_t{timestep:03d}": mean for timestep, mean in zip(TIMESTEPS, means, strict=True)}

    def _batch(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_0 (B, C, h, w), eps (B, levels, C, h, w) and labels (B,), the same every time for an image."""
        mean, std = self.mean[rows].float(), self.std[rows].float()
        noise = torch.stack([torch.randn(1 + NUM_LEVELS, *mean.shape[1:], generator=_generator(number))
                             for number in self.numbers[rows]])  # (B, 1 + levels, C, h, w)
        x_0 = (mean + std * noise[:, 0] - self.shift) * self.scale
        return tuple(x.to(self.device) for x in (x_0, noise[:, 1:], self.labels[rows]))


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(0, number, 0, 0, "validation"))
