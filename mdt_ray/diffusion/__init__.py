"""The diffusion process: hybrid loss, guidance, sampling with diffusers' schedulers. Denoisers come in as callables."""

from mdt_ray.diffusion.guidance import guidance_scale
from mdt_ray.diffusion.loss import q_sample, training_losses

__all__ = ["guidance_scale", "q_sample", "training_losses"]
