"""The module that a training step calls once: full and masked pass and their losses. DDP wraps this, so it sees one forward.

B images of this rank, L tokens, C latent channels, h x w latent size, p patch size.
"""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mdt_ray import config_io
from mdt_ray.config import LossConfig, ModelConfig
from mdt_ray.data.loader import Batch
from mdt_ray.diffusion import q_sample, training_losses
from mdt_ray.models import MDT, DiT, Mask

KEPT_MULTIPLE = 8
"""Where the mask ratio is drawn for every step, kept tokens come in multiples of this."""
MDT_ONLY = ("decode_layer", "masking", "num_side_blocks", "masked_shortcut", "decoder_positions", "learnable_positions",
            "relative_position_bias")


def build_model(config: ModelConfig, passes: str = "full+masked") -> MDT | DiT:
    """A freshly initialised transformer; without a masked pass it gets no parts for one (DDP refuses unused parameters).

    Raises ValueError as the constructors.
    """
    arguments = config_io.to_dict(config)
    kind = arguments.pop("kind")
    if kind == "dit":
        return DiT(**{name: value for name, value in arguments.items() if name not in MDT_ONLY})
    if passes == "full":
        arguments["masking"] = "none"
    return MDT(**arguments, long_skips=kind == "mdt_v2")


def keep_inputs_only(model: MDT | DiT) -> None:
    """Turn gradient checkpointing on. (No block draws random numbers, so their state is not kept.)"""
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False))


class TrainingStep(nn.Module):
    """Losses of a batch: the same x_0 and t go through a full and a masked pass with noise and label drops of their own
    (paper section 4.4; the two losses are added). A model without masking has the full pass only."""

    def __init__(self, model: MDT | DiT, loss: LossConfig, autocast_dtype: torch.dtype | None):
        super().__init__()
        self.model, self.loss, self.autocast_dtype = model, loss, autocast_dtype
        with_mask = isinstance(model, MDT) and loss.passes != "full"
        self.passes = ("full",) * (loss.passes != "masked") + ("masked",) * with_mask

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Per-sample losses (B,): full and masked, as far as the passes go, with their mse and vb parts detached."""
        eps = {name: getattr(batch, f"eps_{name}") for name in self.passes}
        x_t = {name: q_sample(batch.x_0, batch.t, eps[name]) for name in self.passes}  # each (B, C, h, w)
        y = [getattr(batch, f"y_{name}") for name in self.passes]
        mask = self.mask(batch) if "masked" in self.passes else None
        model = self.model.both_passes if len(self.passes) == 2 else self.model
        # One autocast region for both passes: weights are cast once.
        with torch.autocast(batch.x_0.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            outputs = model(torch.cat([*x_t.values()]), batch.t.repeat(len(y)), torch.cat(y), mask=mask)
        losses = {}
        for name, output in zip(self.passes, outputs.chunk(len(self.passes)), strict=True):  # (B, 2C, h, w)
            where = self._pixels(mask.hidden) if name == "masked" and self.loss.tokens == "masked" else None
            found = training_losses(output, batch.x_0, x_t[name], eps[name], batch.t, self.loss.min_snr_gamma, where)
            losses |= {name: found["loss"], f"{name}_mse": found["mse"].detach(), f"{name}_vb": found["vb"].detach()}
        return losses

    def mask(self, batch: Batch) -> Mask:
        """The step's mask; its ratio is the same on every rank."""
        loss = self.loss
        if loss.mask_ratio_span == 0:
            return Mask.from_noise(batch.mask_noise, loss.mask_ratio)
        ratio = loss.mask_ratio + loss.mask_ratio_span * batch.mask_ratio_draw
        return Mask.from_noise(batch.mask_noise, ratio, KEPT_MULTIPLE)

    def _pixels(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) to their latent pixels (B, 1, h, w)."""
        patch_size = self.model.config.patch_size
        tokens = hidden.reshape(-1, 1, *self.model.grid)  # (B, 1, h/p, w/p)
        return tokens.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)
