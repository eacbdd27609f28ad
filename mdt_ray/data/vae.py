"""The autoencoder between images and latents: any diffusers AutoencoderKL, frozen, in float32.

B batch, C latent channels, H x W image, h x w latent.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from mdt_ray import config_io, storage
from mdt_ray.config import VaeConfig
from mdt_ray.data.images import DIGITS


@dataclass(frozen=True)
class Vae:
    """A loaded autoencoder, its scaling, and the hash of its weights."""

    model: AutoencoderKL
    scale: float
    shift: float
    weights_hash: str

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) on [-1, 1] -> posterior mean and std, raw and unscaled, (B, 2, C, h, w) float32."""
        posterior = self.model.encode(images).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, round_pixels: bool = False) -> torch.Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) uint8, truncating (MDT) or rounding (DiT)."""
        images = self.model.decode(latents.float() / self.scale + self.shift).sample
        pixels = (images + 1) * 127.5
        pixels = pixels.round() if round_pixels else pixels
        return pixels.clamp(0, 255).to(torch.uint8)


def load_vae(config: VaeConfig, device: str | torch.device = "cpu") -> Vae:
    """Load by local path, hub id, or `digits`. Raises ValueError if there is no such autoencoder."""
    path = str(DIGITS / "vae") if config.path == "digits" else config.path
    try:
        model = AutoencoderKL.from_pretrained(path, revision=config.revision, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"vae.path = {config.path!r}: no AutoencoderKL there ({str(error).splitlines()[0]}); give a local "
                         "folder, a hub id (with network), or 'digits'") from error
    model = model.eval().requires_grad_(False).to(device)
    return Vae(model=model, scale=model.config.scaling_factor, shift=model.config.shift_factor or 0.0,
               weights_hash=_hash_weights(model))


def vae_fingerprint(config: VaeConfig) -> str:
    """A cheap name of the autoencoder for a run's identity: the bytes of a local folder, or hub id and revision."""
    folder = DIGITS / "vae" if config.path == "digits" else Path(config.path)
    if not folder.is_dir():
        return config_io.fingerprint([config.path, config.revision])
    files = sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".bin"))
    return config_io.fingerprint([[f.name, storage.sha256(f.read_bytes())] for f in files])


def _hash_weights(model: AutoencoderKL) -> str:
    digests = {name: storage.sha256(tensor.detach().cpu().contiguous().numpy().tobytes())
               for name, tensor in model.state_dict().items()}
    return config_io.fingerprint([json.dumps(digests, sort_keys=True)])
