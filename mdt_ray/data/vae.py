"""The autoencoder between images and latents: any diffusers AutoencoderKL, frozen.

B batch, C latent channels, H x W image, h x w latent.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mdt_ray import config_io, storage
from mdt_ray.config import VaeConfig, require
from mdt_ray.data.sources import ASSETS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


EMBEDDED = ("digits", "fashion")
"""Autoencoders in the package, by the name of their data set."""


@dataclass(frozen=True)
class Vae:
    """A loaded autoencoder, its scaling, and the hash of its weights."""

    model: "AutoencoderKL"
    scale: float
    shift: float
    weights_hash: str

    @torch.inference_mode()
    def encode(self, images: torch.Tensor, autocast_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) on [-1, 1] -> posterior mean and std, raw and unscaled, (B, 2, C, h, w) float32.

        `autocast_dtype` is the network's; the posterior is float32 in any case.
        """
        with torch.autocast(images.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            posterior = self.model.encode(images).latent_dist
        posterior = type(posterior)(posterior.parameters.float())
        return torch.stack([posterior.mean, posterior.std], dim=1)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, round_pixels: bool = False) -> torch.Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) uint8, truncating (MDT) or rounding (DiT)."""
        images = self.model.decode(latents.float() / self.scale + self.shift).sample
        pixels = (images + 1) * 127.5
        pixels = pixels.round() if round_pixels else pixels
        return pixels.clamp(0, 255).to(torch.uint8)


def load_vae(config: VaeConfig, device: str | torch.device = "cpu") -> Vae:
    """Load by local path, hub id, or a name of EMBEDDED. Raises ValueError if there is no such autoencoder."""
    model = _open(config, _autoencoder().from_pretrained, low_cpu_mem_usage=False)
    model = model.eval().requires_grad_(False).to(device)
    return Vae(model=model, scale=model.config.scaling_factor, shift=model.config.shift_factor or 0.0,
               weights_hash=_hash_weights(model))


def _autoencoder() -> type["AutoencoderKL"]:
    """Imported where one is loaded: that takes seconds, and most processes only hand its name on."""
    from diffusers import AutoencoderKL

    return AutoencoderKL


def pin_revision(config: VaeConfig) -> VaeConfig:
    """The same autoencoder with a hub's newest revision written out as a commit; a local folder as it is.

    Raises ValueError if there is no such autoencoder.
    """
    if _folder(config.path).is_dir():
        return config
    _, commit = _open(config, _autoencoder().load_config, return_commit_hash=True)
    return VaeConfig(path=config.path, revision=commit or config.revision)


def vae_config(config: VaeConfig) -> dict:
    """The autoencoder's own settings, without its weights. Raises ValueError if there is no such autoencoder."""
    return _open(config, _read_settings)


def _read_settings(path: str, **options: Any) -> dict:
    file = Path(path) / "config.json"
    settings = json.loads(file.read_text()) if Path(path).is_dir() else _autoencoder().load_config(path, **options)
    if "block_out_channels" not in settings:
        raise ValueError("its config.json has no block_out_channels")
    return settings


def downscaling(settings: dict) -> int:
    """Image pixels per latent pixel: each level but the last halves."""
    return 2 ** (len(settings["block_out_channels"]) - 1)


def check_image_size(config: VaeConfig, image_size: int) -> None:
    """Raise ValueError for a side that the autoencoder does not divide."""
    factor = downscaling(vae_config(config))
    require(image_size % factor == 0, "image_size", image_size,
            f"must be divisible by {factor}, the downscaling of vae.path = {config.path!r}")


def _folder(path: str) -> Path:
    """Where an autoencoder lies that is in the package, else the path itself."""
    return ASSETS / path / "vae" if path in EMBEDDED else Path(path)


def _open(config: VaeConfig, load: Callable[..., Any], **options: Any) -> Any:
    path, subfolder = str(_folder(config.path)), None
    if not Path(path).is_dir() and path.count("/") == 2 and not path.startswith("/"):  # user/repository/subfolder
        path, _, subfolder = path.rpartition("/")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers calls the hub's client so
            return load(path, revision=config.revision, subfolder=subfolder, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"vae.path = {config.path!r}: no AutoencoderKL there ({str(error).splitlines()[0]}); give a local "
                         "folder, a hub id (with network), 'digits' or 'fashion'") from error


def vae_fingerprint(config: VaeConfig) -> str:
    """A cheap name of the autoencoder for a run's identity: the bytes of a local folder, or hub id and revision."""
    folder = _folder(config.path)
    if not folder.is_dir():
        return config_io.fingerprint([config.path, config.revision])
    files = sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".bin"))
    return config_io.fingerprint([[f.name, storage.sha256(f.read_bytes())] for f in files])


def _hash_weights(model: torch.nn.Module) -> str:
    digests = {name: storage.sha256(tensor.detach().cpu().contiguous().numpy().tobytes())
               for name, tensor in model.state_dict().items()}
    return config_io.fingerprint([json.dumps(digests, sort_keys=True)])


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) on [-1, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
