"""Images from a checkpoint: image i is a pure function of (checkpoint, sampling config, seed + i).

B batch, C latent channels, h x w latent, H x W image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mdt_ray import checkpoints, storage
from mdt_ray.config import SamplingConfig, VaeConfig
from mdt_ray.data.vae import Vae, load_vae
from mdt_ray.diffusion.guidance import Denoiser, guided
from mdt_ray.diffusion.sampling import make_scheduler, sample

if TYPE_CHECKING:
    from mdt_ray.models import MDT, DiT


def check_weights(checkpoint: str, weights: str) -> None:
    """Raise ValueError, naming those there, if a checkpoint folder (URI) has no such weights."""
    if not weights or not storage.exists(storage.join(checkpoint, weights, "config.json")):
        names = [name for name in storage.list_names(checkpoint)
                 if storage.exists(storage.join(checkpoint, name, "config.json"))]
        raise ValueError(f"weights = {weights!r}: {checkpoint} has no such weights; use one of {', '.join(names)}")


def load_model(checkpoint: str, weights: str) -> MDT | DiT:
    """Weights of a checkpoint folder (URI), in evaluation mode: `ema`, the raw `model`, or a further average by its name.

    Raises ValueError as `check_weights`, and for files that are not what the checkpoint's checksums say.
    """
    from mdt_ray.models import CLASSES  # imports diffusers, which takes seconds: not where a checkpoint is only named

    check_weights(checkpoint, weights)
    with storage.fetched(storage.join(checkpoint, weights)) as folder:
        checkpoints.check_part(checkpoint, weights, folder)
        name = storage.read_json(str(folder / "config.json"))["_class_name"]
        return CLASSES[name].from_pretrained(folder, low_cpu_mem_usage=False).eval().requires_grad_(False)


def check_guide(facts: dict, guide: str) -> None:
    """Raise ValueError unless the checkpoint `guide` (URI) has the latents and classes of the model, whose state.json has
    `facts`."""
    others = storage.read_json(storage.join(guide, "state.json"))
    for name in ("latent_shape", "num_classes", "vae"):
        if others[name] != facts[name]:
            raise ValueError(f"sampling.guide = {guide!r}: its {name} is {others[name]}, the model's {facts[name]}; a guide "
                             "must have been trained on the same latents")


def labels_of(first: int, stop: int, num_classes: int, kind: str, seed: int) -> torch.Tensor:
    """Labels of images first..stop, (n,) int64: `random` draws each from its own seed, `balanced`
    takes the classes in turn. Label i depends on seed + i only. -1 without classes."""
    if not num_classes:
        return torch.full((stop - first,), -1)
    if kind == "balanced":
        return torch.arange(seed + first, seed + stop) % num_classes
    draws = [torch.randint(num_classes, (), generator=_generator(seed + i, "label")) for i in range(first, stop)]
    return torch.stack(draws)


def _generator(seed: int, stream: str) -> torch.Generator:
    """One image's generator; labels and noise have streams of their own, so that neither shifts the other."""
    return torch.Generator().manual_seed(2 * seed + (stream == "label"))


@dataclass(frozen=True)
class Networks:
    """What a sampler computes with; loaded once, however many settings it is used with."""

    model: MDT | DiT
    guide: MDT | DiT | None
    facts: dict
    """state.json of the checkpoint."""
    device: torch.device
    autocast_dtype: torch.dtype | None

    @property
    def num_classes(self) -> int:
        return self.facts["num_classes"]

    def denoiser(self, model: MDT | DiT) -> Denoiser:
        """The model, or the guide, in the precision asked for."""
        def denoise(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                return model(x, t, y)

        return denoise


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast in place, once, the weights that autocast to `dtype` would cast at every call: the same bits for less memory.

    Embeddings, positions and biases of attention stay as they are.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(dtype)


def prepare(model: MDT | DiT, autocast_dtype: torch.dtype | None, compile: bool) -> MDT | DiT:
    """The model, made ready in place for many calls in this precision, its blocks compiled or not."""
    if autocast_dtype is not None:
        cast_products(model, autocast_dtype)
    if compile:
        from mdt_ray.models.compiling import compile_blocks

        compile_blocks(model)
    return model


def load_networks(checkpoint: str, config: SamplingConfig, device: str | torch.device = "cpu",
                  autocast_dtype: torch.dtype | None = None, compile: bool = False) -> Networks:
    """The model of a checkpoint (URI) and, where the settings name one, its guide; with `compile`, their blocks compiled for
    each number of images when it first comes.

    Raises ValueError for weights that are not there, and a guide of other latents.
    """
    facts, device = storage.read_json(storage.join(checkpoint, "state.json")), torch.device(device)
    if config.guide:
        check_guide(facts, config.guide)

    def load(checkpoint: str, weights: str) -> MDT | DiT:
        return prepare(load_model(checkpoint, weights).to(device), autocast_dtype, compile)

    guide = load(config.guide, config.guide_weights) if config.guide else None
    return Networks(load(checkpoint, config.weights), guide, facts, device, autocast_dtype)


def load_decoder(facts: dict, device: str | torch.device = "cpu") -> Vae:
    """The autoencoder of a checkpoint's latents. Raises ValueError where its weights are other ones by now."""
    vae = load_vae(VaeConfig(path=facts["vae"]["path"], revision=facts["vae"]["revision"]), device)
    if facts["vae"]["weights_hash"] not in (None, vae.weights_hash):  # (a converted checkpoint does not say)
        raise ValueError(f"vae {facts['vae']['path']!r}: not the weights that the latents were made with; "
                         "fix its revision, or bring back the folder as it was")
    return vae


def check_guidance(config: SamplingConfig, networks: Networks) -> None:
    """Raise ValueError where the model has nothing to be guided by."""
    if config.cfg_scale == 1 or networks.guide is not None:
        return
    if not networks.num_classes:
        raise ValueError(f"sampling.cfg_scale = {config.cfg_scale}: the model is unconditional; use cfg_scale 1, or a guide")
    if not networks.model.config.class_dropout_prob:
        raise ValueError(f"sampling.cfg_scale = {config.cfg_scale}: the model was trained without label dropout, so it "
                         "has no null label to be guided by; use cfg_scale 1, or a guide")


def draw_latents(networks: Networks, config: SamplingConfig, first: int, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Scaled latents of images first, first + 1, ... with the given labels (B,): (B, C, h, w) float32.

    Raises ValueError as `check_guidance`.
    """
    check_guidance(config, networks)
    generators = [_generator(seed + first + i, "noise") for i in range(len(labels))]
    shape = tuple(networks.facts["latent_shape"])
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])  # (B, C, h, w)
    denoiser = networks.denoiser(networks.model)
    if config.cfg_scale != 1:
        denoiser = guided(denoiser, networks.num_classes, config.cfg_scale, config.cfg_power, config.cfg_channels,
                          config.cfg_interval, networks.guide and networks.denoiser(networks.guide))
    return sample(denoiser, noise.to(networks.device), labels.to(networks.device), make_scheduler(config.sampler),
                  config.num_sampling_steps, generators)


class Sampler:
    """Draws images from one checkpoint. Loading is done once, in the constructor."""

    def __init__(self, checkpoint: str, config: SamplingConfig, device: str | torch.device = "cpu",
                 autocast_dtype: torch.dtype | None = None, compile: bool = False):
        self.config = config
        self.networks = load_networks(checkpoint, config, device, autocast_dtype, compile)
        check_guidance(config, self.networks)
        self.vae = load_decoder(self.networks.facts, device)

    @property
    def num_classes(self) -> int:
        return self.networks.num_classes

    def draw(self, first: int, labels: torch.Tensor, seed: int) -> torch.Tensor:
        """Images first, first + 1, ... with the given labels (B,): (B, 3, H, W) uint8."""
        latents = draw_latents(self.networks, self.config, first, labels, seed)
        return self.vae.decode(latents, self.config.round_pixels).cpu()
