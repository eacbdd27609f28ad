"""The baseline of sampling.py: guided ancestral sampling in eager fp32, written the way the published system works.

Not fast on purpose: the batch is doubled once, before the first step, and both halves go through every step, each call
makes the first half's noisy latents those of both; the tables of the diffusion are float64 arrays, taken to the device and
looked up at every use; the network is published_step.py's. Written from the papers (arXiv 2006.11239, 2102.09672,
2207.12598, and 2303.14389 appendix D) and a description.

B batch, C latent channels, h x w latent size.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from published_step import PublishedMDT

from mdt_ray.config import NUM_TIMESTEPS
from mdt_ray.diffusion.loss import BETA_END, BETA_START
from mdt_ray.models import MDT

NUM_GUIDED_CHANNELS = 3


class PublishedSampler:
    """`num_steps` respaced steps with learned-range variance, guided with the power-cosine schedule."""

    def __init__(self, ours: MDT, num_steps: int, scale: float, power: float):
        self.model = PublishedMDT(ours).to(ours.device).eval()
        self.null_label, self.scale, self.power = ours.config.num_classes, scale, power
        self.timesteps = np.linspace(0, NUM_TIMESTEPS - 1, num_steps).round().astype(np.int64)
        cumprod = np.cumprod(1 - np.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=np.float64))[self.timesteps]
        previous = np.append(1.0, cumprod[:-1])
        self.betas = 1 - cumprod / previous
        self.sqrt_recip, self.sqrt_recip_minus_1 = np.sqrt(1 / cumprod), np.sqrt(1 / cumprod - 1)
        variance = self.betas * (1 - previous) / (1 - cumprod)
        self.log_variance = np.log(np.append(variance[1], variance[1:]))
        self.mean_of_x_0 = self.betas * np.sqrt(previous) / (1 - cumprod)
        self.mean_of_x_t = (1 - previous) * np.sqrt(1 - self.betas) / (1 - cumprod)

    @torch.no_grad()
    def __call__(self, noise: torch.Tensor, y: torch.Tensor,
                 draw: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like) -> torch.Tensor:
        """Latents x_0 (B, C, h, w) from noise (B, C, h, w) and labels (B,); `draw` gives a step's noise, shaped as its
        argument, (2B, C, h, w)."""
        x = torch.cat([noise, noise], dim=0)
        y = torch.cat([y, torch.full_like(y, self.null_label)], dim=0)
        for i in reversed(range(len(self.timesteps))):
            x = self.step(x, torch.tensor([i] * x.shape[0], device=x.device), y, draw)
        return x.chunk(2, dim=0)[0]

    def step(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor,
             draw: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """One step for both halves, t counting the steps: (2B, C, h, w)."""
        eps, v = torch.split(self.guided(x, torch.tensor(self.timesteps, device=x.device)[t], y), x.shape[1], dim=1)
        share = (v + 1) / 2
        log_variance = share * self.look_up(np.log(self.betas), t, x) + (1 - share) * self.look_up(self.log_variance, t, x)
        x_0 = self.look_up(self.sqrt_recip, t, x) * x - self.look_up(self.sqrt_recip_minus_1, t, x) * eps
        mean = self.look_up(self.mean_of_x_0, t, x) * x_0 + self.look_up(self.mean_of_x_t, t, x) * x
        not_last = (t != 0).float().view(-1, 1, 1, 1)
        return mean + not_last * torch.exp(0.5 * log_variance) * draw(x)

    def look_up(self, table: np.ndarray, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(table).to(x.device)[t].float()[:, None, None, None].expand(x.shape)

    def guided(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        half = x[:len(x) // 2]
        output = self.model(torch.cat([half, half], dim=0), t, y)  # (2B, 2C, h, w)
        eps, rest = output[:, :NUM_GUIDED_CHANNELS], output[:, NUM_GUIDED_CHANNELS:]
        cond, uncond = torch.split(eps, len(eps) // 2, dim=0)
        w = (1 - torch.cos(((1 - t / NUM_TIMESTEPS) ** self.power) * math.pi)) / 2  # (2B,)
        w = (1 + (self.scale - 1) * w)[:len(half)].view(-1, 1, 1, 1)
        half_eps = uncond + w * (cond - uncond)
        return torch.cat([torch.cat([half_eps, half_eps], dim=0), rest], dim=1)
