"""From noise to latents with diffusers' schedulers, whose settings here are those that reproduce the reference chains.

B batch, C latent channels, h x w latent size.
"""

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin

from mdt_ray.config import NUM_TIMESTEPS
from mdt_ray.diffusion.guidance import Denoiser
from mdt_ray.diffusion.loss import BETA_END, BETA_START


def make_scheduler(sampler: str, num_steps: int) -> SchedulerMixin:
    """A diffusers scheduler, ready to step.

    ddpm: ancestral sampling with learned-range variance, the papers' protocol at 250 steps.
    ddim: first-order DPM-Solver, which is DDIM (eta 0) on the reference timesteps; diffusers' DDIMScheduler steps to
        t - 1000/n instead of the next timestep of the list.
    dpm-solver++: second-order multistep, on diffusers' own timesteps, which stop short of 0. (On the reference ones its last
        but one step, to t = 0, extrapolates too far: 25 steps leave a Gaussian 19% too wide, against 2% here.)
    Raises ValueError for another name.
    """
    betas = {"num_train_timesteps": NUM_TIMESTEPS, "beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "linear"}
    if sampler == "ddpm":
        scheduler = DDPMScheduler(**betas, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
        scheduler.set_timesteps(num_steps)
        return scheduler
    if sampler not in ("ddim", "dpm-solver++"):
        raise ValueError(f"sampler = {sampler!r}: must be one of 'ddpm', 'ddim', 'dpm-solver++'")
    scheduler = DPMSolverMultistepScheduler(**betas, solver_order=1 if sampler == "ddim" else 2,
                                            algorithm_type="dpmsolver++", final_sigmas_type="zero")
    if sampler == "ddim":
        timesteps = np.linspace(0, NUM_TIMESTEPS - 1, num_steps).round().astype(int)[::-1]
        scheduler.set_timesteps(timesteps=timesteps.tolist())
    else:
        scheduler.set_timesteps(num_steps)
    return scheduler


@torch.inference_mode()
def sample(denoiser: Denoiser, noise: torch.Tensor, y: torch.Tensor, sampler: str, num_steps: int,
           generators: list[torch.Generator] | None = None) -> torch.Tensor:
    """Draw latents x_0.

    Args:
        denoiser: maps (x_t, t, y) to noise and variance interpolation, (B, 2C, h, w).
        noise: the start, (B, C, h, w).
        y: labels (B,).
        sampler, num_steps: as for make_scheduler.
        generators: one per sample, for the noise of the ancestral steps.
    Returns: (B, C, h, w) float32.
    """
    scheduler = make_scheduler(sampler, num_steps)
    x = noise.float()
    for t in scheduler.timesteps:
        output = denoiser(x, t.to(x.device).expand(x.shape[0]), y).float()  # (B, 2C, h, w)
        if sampler == "ddpm":
            x = scheduler.step(output, t, x, generator=generators).prev_sample
        else:  # a DPM-Solver takes the noise alone
            x = scheduler.step(output.chunk(2, dim=1)[0], t, x).prev_sample
    return x
