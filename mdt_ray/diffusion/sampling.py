"""From noise to latents with diffusers' schedulers: `make_scheduler` has the settings that reproduce the reference chains,
and any other scheduler of diffusers may be handed in. (They are imported late: they load all of SciPy, which takes a second
of each process.)

B batch, C latent channels, h x w latent size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from mdt_ray.config import NUM_TIMESTEPS
from mdt_ray.diffusion.guidance import Denoiser
from mdt_ray.diffusion.loss import BETA_END, BETA_START

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SAMPLERS = ("ddpm", "ddim", "dpm-solver++")
LEARNED = ("learned", "learned_range")


def make_scheduler(sampler: str) -> SchedulerMixin:
    """A diffusers scheduler with our betas.

    ddpm: ancestral sampling with learned-range variance, the papers' protocol at 250 steps.
    ddim: first-order DPM-Solver, which is DDIM (eta 0) on the reference timesteps; diffusers' DDIMScheduler steps to
        t - 1000/n instead of the next timestep of the list.
    dpm-solver++: second-order multistep.
    Raises ValueError for another name.
    """
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    betas = {"num_train_timesteps": NUM_TIMESTEPS, "beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "linear"}
    if sampler == "ddpm":
        return DDPMScheduler(**betas, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler = {sampler!r}: must be one of {', '.join(map(repr, SAMPLERS))}")
    return DPMSolverMultistepScheduler(**betas, solver_order=1 if sampler == "ddim" else 2, algorithm_type="dpmsolver++",
                                       final_sigmas_type="zero")


def ready(scheduler: SchedulerMixin, num_steps: int, device: torch.device | str = "cpu") -> SchedulerMixin:
    """A copy of `scheduler` with its timesteps set, safe to step with a learned-range model.

    A scheduler made by `from_config` of a DDPM one inherits its learned variance, and a DPM-Solver, once told of it, keeps
    the first 3 channels of what it is given. Only DDPM steps take the variance; for all others it is switched off.
    First-order DPM-Solver gets the reference timesteps of DDIM. Every other scheduler has its own: the second-order solver's
    stop short of 0. (On the reference ones its last but one step, to t = 0, extrapolates too far: 25 steps leave a Gaussian
    19% too wide, against 2% here.)

    Raises ValueError for less than one step, or a scheduler that expects another prediction than the noise.
    """
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    config = dict(scheduler.config)
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: must be at least 1")
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"scheduler: predicts {config['prediction_type']!r}, but the model predicts the noise ('epsilon')")
    if config.get("variance_type") in LEARNED and not isinstance(scheduler, DDPMScheduler):
        config["variance_type"] = None
    scheduler = type(scheduler).from_config(config)
    if isinstance(scheduler, DPMSolverMultistepScheduler) and scheduler.config.solver_order == 1:
        timesteps = np.linspace(0, NUM_TIMESTEPS - 1, num_steps).round().astype(int)[::-1]
        scheduler.set_timesteps(timesteps=timesteps.tolist(), device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)
    return scheduler


@torch.no_grad()
def sample(denoiser: Denoiser, noise: torch.Tensor, y: torch.Tensor, scheduler: SchedulerMixin, num_steps: int,
           generators: torch.Generator | list[torch.Generator] | None = None,
           progress: Callable[[Iterable], Iterable] = iter,
           known: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """Draw latents x_0.

    Args:
        denoiser: maps (x_t, t, y) to noise and variance interpolation, (B, 2C, h, w).
        noise: the start, standard normal, (B, C, h, w).
        y: labels (B,).
        scheduler: any of diffusers' for noise prediction; it is copied, not changed.
        num_steps: steps, and calls of the denoiser for schedulers of one call a step.
        generators: one per sample, or one for all, for the noise of stochastic steps.
        progress: wraps the timesteps, to show where the loop is.
        known: latents x_0 (B, C, h, w) and which pixels of them to draw anew, (B, 1, h, w) bool. Before every step all
            others are set to x_0 with that step's noise (RePaint, arXiv 2201.09865, without its resampling).
    Returns: (B, C, h, w) float32.
    """
    scheduler = ready(scheduler, num_steps, noise.device)
    takes_variance = scheduler.config.get("variance_type") in LEARNED
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise.float() * scheduler.init_noise_sigma
    for t in progress(scheduler.timesteps):
        if known is not None:
            x = torch.where(known[1], x, scheduler.add_noise(known[0], noise.float(), t.expand(x.shape[0])))
        x_t = scheduler.scale_model_input(x, t)  # (schedulers in sigma keep another scale)
        output = denoiser(x_t, t.expand(x.shape[0]), y).float()  # (B, 2C, h, w)
        x = scheduler.step(output if takes_variance else output.chunk(2, dim=1)[0], t, x, **extra).prev_sample
    return x if known is None else torch.where(known[1], x, known[0])
