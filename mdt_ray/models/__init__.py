"""The denoising transformers: MDT (arXiv 2303.14389) and the DiT baseline (arXiv 2212.09748), as diffusers models."""

from mdt_ray.models import official
from mdt_ray.models.dit import DiT
from mdt_ray.models.masking import Mask, num_kept, sample_mask
from mdt_ray.models.mdt import MDT

__all__ = ["CLASSES", "MDT", "DiT", "Mask", "num_kept", "official", "sample_mask"]

CLASSES = {"MDT": MDT, "DiT": DiT}
"""By the name that a checkpoint's config.json gives."""
