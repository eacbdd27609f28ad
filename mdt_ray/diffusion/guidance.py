"""Guidance: classifier-free (arXiv 2207.12598) with MDT's power-cosine schedule (paper appendix D), in an interval only
(arXiv 2404.07724), or by a worse model (autoguidance, arXiv 2406.02507). Not a sampler.

B batch, C latent channels, h x w latent size.
"""

import math
from collections.abc import Callable

import torch

from mdt_ray.config import NUM_TIMESTEPS

Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_t (B, C, h, w), t (B,), y (B,)) -> (B, 2C, h, w), noise then variance interpolation."""


def guidance_scale(t: torch.Tensor | int, scale: float, power: float) -> torch.Tensor:
    """Guidance weight at timestep t: w(t) = 1 + (scale - 1)(1 - cos(pi (1 - t/1000)^power)) / 2, for power > 0.

    The paper's formula lacks the `1 +`, and would start unconditional. power = 0 keeps the scale constant.
    t: any shape, 0..999. Returns float64 of t's shape.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    if power == 0:
        return torch.full_like(t, scale)
    return 1 + (scale - 1) * (1 - torch.cos(math.pi * (1 - t / NUM_TIMESTEPS) ** power)) / 2


def guided(model: Denoiser, null_label: int, scale: float, power: float = 0.0, channels: int | None = None,
           interval: tuple[int, int] | None = None, guide: Denoiser | None = None) -> Denoiser:
    """A denoiser that moves the model's noise away from its unconditional prediction: uncond + w(t) (cond - uncond).

    Variance channels, and noise channels beyond `channels`, are the model's own for the label.

    Args:
        null_label: the label of "no class".
        scale, power: of guidance_scale.
        channels: guide only the first n noise channels (3 in the published models); None guides all.
        interval: guide from the first to the last of these timesteps only, both included; where no sample's timestep is
            among them, the other prediction is not computed.
        guide: takes the place of the unconditional prediction, for the same label: a smaller or less trained model.
    """

    def denoise(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        w = guidance_scale(t, scale, power)  # (B,)
        if interval is not None:
            inside = (t >= interval[0]) & (t <= interval[1])  # (B,)
            if not inside.any():
                return model(x, t, y)
            w = torch.where(inside, w, 1.0)
        if guide is None:
            both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null_label)]))
            cond, uncond = both.chunk(2)  # 2 x (B, 2C, h, w)
        else:
            cond, uncond = model(x, t, y), guide(x, t, y)
        num_guided = x.shape[1] if channels is None else channels
        w = w.to(cond.dtype)[:, None, None, None]  # (B, 1, 1, 1)
        eps = uncond[:, :num_guided] + w * (cond[:, :num_guided] - uncond[:, :num_guided])
        return torch.cat([eps, cond[:, num_guided:]], dim=1)  # (B, 2C, h, w)

    return denoise
