"""The module that a training step calls once: full and masked pass and their losses. DDP wraps this, so it sees one forward.

B images of this rank, C latent channels, h x w latent size.
"""

import torch
from torch import nn

from mdt_ray.data.loader import Batch
from mdt_ray.diffusion import q_sample, training_losses
from mdt_ray.models import MDT, DiT, Mask


def build_model(kind: str, **config) -> MDT | DiT:
    """A freshly initialised transformer; `config` are the constructor's arguments. ValueError as the constructors."""
    if kind == "dit":
        config.pop("decode_layer", None)
        return DiT(**config)
    return MDT(**config)


class TrainingStep(nn.Module):
    """Losses of a batch: the same x_0 and t go through a full and, for MDT, a masked pass with noise and label drops of
    their own (paper section 4.4; the two losses are added)."""

    def __init__(self, model: MDT | DiT, mask_ratio: float, autocast_dtype: torch.dtype | None):
        super().__init__()
        self.model, self.mask_ratio, self.autocast_dtype = model, mask_ratio, autocast_dtype

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Per-sample losses (B,): full, and for MDT masked (each mse + vb), with their mse and vb parts detached."""
        # One autocast region for both passes: weights are cast once.
        with torch.autocast(batch.x_0.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            losses = self._losses("full", batch, batch.eps_full, batch.y_full, None)
            if isinstance(self.model, MDT):
                mask = Mask.from_noise(batch.mask_noise, self.mask_ratio)
                losses |= self._losses("masked", batch, batch.eps_masked, batch.y_masked, mask)
        return losses

    def _losses(self, name: str, batch: Batch, eps: torch.Tensor, y: torch.Tensor, mask: Mask | None) -> dict:
        x_t = q_sample(batch.x_0, batch.t, eps)  # (B, C, h, w)
        output = self.model(x_t, batch.t, y, mask=mask)  # (B, 2C, h, w)
        losses = training_losses(output, batch.x_0, x_t, eps, batch.t)
        return {name: losses["loss"], f"{name}_mse": losses["mse"].detach(), f"{name}_vb": losses["vb"].detach()}
