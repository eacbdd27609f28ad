"""MDTInpaintPipeline: fill in the masked part of an image (paper appendix C). The side-interpolator stays in use.

B images, L tokens, C latent channels, h x w latent, H x W image.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from mdt_ray.diffusion.sampling import sample
from mdt_ray.inference.pipeline import Generators, MDTPipeline
from mdt_ray.models import Mask, num_kept

logger = logging.getLogger(__name__)


class MDTInpaintPipeline(MDTPipeline):
    """Opens whatever MDTPipeline opens. Known tokens follow the image through the noise, hidden ones are drawn.

    With MDTv2 the denoiser is the masked pass of training: its encoder sees the known tokens only, the side-interpolator
    predicts the hidden ones, and the decoder gets the noisy patches through its skips. The masked pass of MDT v1 (and of a
    DiT, which has none) never sees the noise of a hidden token, so that its best prediction of it is zero, and trained
    models do predict zero: they inpaint by the full pass.
    """

    @torch.no_grad()
    def __call__(self, image: Any, mask_image: Any = None, mask_ratio: float | None = None,
                 class_labels: int | str | Sequence[int | str] | None = None, guidance_scale: float = 1.0,
                 guidance_power: float = 0.0, num_inference_steps: int = 50, generator: Generators = None,
                 guidance_channels: int | None = None, side_interpolator: bool | None = None, output_type: str = "pil",
                 return_dict: bool = True) -> ImagePipelineOutput | tuple:
        """Fill in images.

        Args:
            image: PIL image(s), or a float array (B, H, W, 3) or tensor (B, 3, H, W) in [0, 1].
            mask_image: white (above 0.5) where to fill in: PIL image(s), or an array (B, H, W) or tensor (B, H, W), of the
                image's size; one for all or one for each. A token is hidden if any pixel of it is.
            mask_ratio: instead, hide this share of the tokens at random (`hidden_tokens` draws them).
            class_labels: one for each image; None for the null label (or an unconditional model).
            side_interpolator: use the masked pass; None does where it sees the noise (MDTv2).
            others: as in MDTPipeline.
        Raises ValueError for a mask that hides nothing or all, or (for the masked pass) unlike numbers of tokens in the
        images of one call, and for a side-interpolator where the model cannot use it.
        """
        config = self.transformer.config
        has_masked_pass = config.get("masking", "none") != "none"
        sees_noise = config.get("long_skips", False)
        if side_interpolator and not has_masked_pass:
            raise ValueError("side_interpolator = True: this model has no masked pass; leave it out")
        if side_interpolator and not sees_noise:
            logger.warning("the masked pass of MDT v1 never sees the noise of hidden tokens, and predicts none")
        if getattr(image, "dtype", None) in (torch.uint8, np.dtype("uint8")):
            raise ValueError("image: has dtype uint8; give PIL images, or floats in [0, 1]")
        pixels = self.image_processor.preprocess(image).to(self._execution_device, self.vae.dtype)  # (B, 3, H, W), [-1, 1]
        x_0 = self._encode(pixels)  # (B, C, h, w)
        hidden = self.hidden_tokens(len(x_0), mask_image, mask_ratio, generator).to(x_0.device)  # (B, L)
        y = self._known_labels(class_labels, len(x_0))  # (B,)
        denoiser = self._denoise
        if has_masked_pass and (sees_noise if side_interpolator is None else side_interpolator):
            mask = Mask.from_hidden(hidden)

            def denoiser(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return self.transformer(x.to(self.transformer.dtype), t, y, mask=mask.repeat(len(x) // len(hidden)))

        denoiser = self._guided(denoiser, guidance_scale, guidance_power, guidance_channels)
        tokens = hidden.reshape(-1, 1, *self.transformer.grid)  # (B, 1, h/p, w/p)
        where = tokens.repeat_interleave(config.patch_size, 2).repeat_interleave(config.patch_size, 3)  # (B, 1, h, w)
        noise = self._noise(len(y), generator, None)
        x = sample(denoiser, noise, y, self.scheduler, num_inference_steps, generator, self.progress_bar, (x_0, where))
        return self._finish(x, output_type, return_dict)

    def hidden_tokens(self, batch: int, mask_image: Any = None, mask_ratio: float | None = None,
                      generator: Generators = None) -> torch.Tensor:
        """Which tokens a mask hides, (B, L) bool. Raises ValueError unless one mask is given, and hides some but not all."""
        if (mask_image is None) == (mask_ratio is None):
            raise ValueError("mask_image, mask_ratio: give one of the two")
        rows, columns = self.transformer.grid
        token = self.transformer.config.patch_size * self.image_processor.config.vae_scale_factor
        if mask_ratio is not None:
            kept = num_kept(rows * columns, mask_ratio)
            draws = randn_tensor((batch, rows * columns), generator=generator, device=self._execution_device)
            hidden = draws.argsort(dim=1).argsort(dim=1) >= kept  # (B, L)
        else:
            white = _white(mask_image)  # (1 or B, 1, H, W)
            if white.shape[2:] != (rows * token, columns * token) or len(white) not in (1, batch):
                raise ValueError(f"mask_image: {len(white)} of {tuple(white.shape[2:])} pixels: must be one, or one for "
                                 f"each of {batch} images, of {(rows * token, columns * token)} pixels")
            hidden = torch.nn.functional.max_pool2d(white, token).flatten(1).bool().expand(batch, -1)  # (B, L)
        if not hidden.any(dim=1).all() or hidden.all(dim=1).any():
            raise ValueError(f"mask: hides {hidden.sum(dim=1).tolist()} of {rows * columns} tokens: must hide some, not all")
        return hidden

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        mean = self.vae.encode(pixels).latent_dist.mean.float()
        x_0 = (mean - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        self._noise(len(x_0), None, x_0)  # (checks the size)
        return x_0

    def _known_labels(self, class_labels: Any, batch: int) -> torch.Tensor:
        config = self.transformer.config
        if class_labels is None and config.num_classes and config.class_dropout_prob:
            return torch.full((batch,), config.num_classes, device=self._execution_device)
        y = self._labels(class_labels, batch)
        if len(y) != batch:
            raise ValueError(f"class_labels: {len(y)} for {batch} images; give one for each")
        return y


def _white(mask_image: Any) -> torch.Tensor:
    """Which pixels of mask pictures are white, float (B, 1, H, W)."""
    pictures = mask_image if isinstance(mask_image, list | tuple) else [mask_image]
    arrays = [np.asarray(p.convert("L")) / 255 if isinstance(p, Image.Image) else np.asarray(p) for p in pictures]
    values = torch.from_numpy(np.stack(arrays).astype(np.float32))  # (1 or B, ..., H, W)
    if values.shape[-1] in (1, 3) and values.ndim > 3:  # arrays with channels last
        values = values.mean(dim=-1)
    height, width = values.shape[-2:]
    return (values.reshape(-1, 1, height, width) > 0.5).float()
