"""DINOv2 for FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675): the class token of ViT-L/14, in float32.

Not a ViT of our own: the network is transformers' Dinov2Model. Ours are the preparation of the images and the resize of
the position embeddings, both as EDM2 (Karras et al. 2023, arXiv:2312.02696) computes that metric.

B batch, H x W image, D width.
"""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn

from mdt_ray import storage
from mdt_ray.evaluation.features import Features, check_images
from mdt_ray.evaluation.precision import full_float32

logger = logging.getLogger(__name__)

WEIGHTS = "facebook/dinov2-large"
FILES = ["config.json", "model.safetensors"]  # no pickle
IMAGE_SIZE = 224
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE  # patches along a side
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0..1, red, green, blue
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
GRID_OFFSET = 0.1  # a quirk of the published network, in the patches that it reckons along a side of its position grid


class Dinov2(nn.Module):
    """Images in, `Features` out: pool (B, D), D = 1024 for ViT-L, float32; no spatial map, no logits.

    Always in eval mode and without gradients. Layer norm only, so an image's features do not depend on its batch.
    """

    name = "dinov2"

    def __init__(self, network: nn.Module) -> None:
        """Takes over transformers' Dinov2Model `network`, of patches of 14 pixels, and fits its position grid to 224."""
        super().__init__()
        embeddings = network.embeddings
        embeddings.position_embeddings = nn.Parameter(resize_positions(embeddings.position_embeddings.detach(), GRID))
        self.network = network
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)  # (3, 1, 1)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)  # (3, 1, 1)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Dinov2:
        """Stays in eval mode, whatever `mode`: a model that holds this network may be switched to training."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> Features:
        """Features of uint8 `images` (B, 3, H, W) in 0..255, of any size. ValueError on any other dtype or shape."""
        check_images(images)
        device = self.mean.device
        with torch.autocast(device.type, enabled=False), full_float32():
            tokens = self.network(self.prepare(images.to(device))).last_hidden_state  # (B, 1 + GRID^2, D), normed
        return Features(tokens[:, 0].contiguous(), None, None)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, 224, 224): stretched to the square, not cropped, and normalised.

        The cubic filter overshoots 0..255 near edges and is not clipped, as in EDM2 (Stein et al. resize 8-bit pictures).
        """
        x = F.interpolate(images.float(), (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)  # (B, 3, 224, 224)
        return (x / 255 - self.mean) / self.std


def resize_positions(embeddings: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings (1, 1 + M * M, D) -> (1, 1 + side * side, D): the class's stays, the patches' grid is resized.

    As in the network's first publication, whose cubic resize (without antialias) takes `side + 0.1` for the new side when
    it places the points. transformers leaves out that tenth, and so reads the far edge of a 37-grid 0.2 points further on.
    """
    size = math.isqrt(embeddings.shape[1] - 1)  # M
    if size == side:
        return embeddings
    grid = embeddings[:, 1:].unflatten(1, (size, size)).permute(0, 3, 1, 2)  # (1, D, M, M)
    grid = F.interpolate(grid, scale_factor=(side + GRID_OFFSET) / size, mode="bicubic")  # (1, D, side, side)
    return torch.cat([embeddings[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def load_dinov2(weights: str | Path = WEIGHTS, device: str | torch.device = "cpu") -> Dinov2:
    """The network with published weights, as transformers writes them: config.json and model.safetensors.

    weights: a local folder, or a hub id, downloaded once into the hub's cache; `id@revision` is a commit, tag or branch.

    Raises ValueError if transformers is not installed, if the files are not there or cannot be downloaded, or if they are
    not, key for key and shape for shape, a Dinov2Model of patches of 14 pixels.
    """
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise ValueError('extractor = "dinov2": needs the package transformers; '
                         'install it with: pip install "mdt-ray[dinov2]"') from error
    folder = find_dinov2(weights)
    config = storage.read_json(str(folder / "config.json"))
    found = config.get("model_type"), config.get("patch_size")
    if found != ("dinov2", PATCH_SIZE):
        raise ValueError(f"DINOv2 weights: {folder}/config.json has model_type, patch_size = {found}, but they must be "
                         f"('dinov2', {PATCH_SIZE}); take {WEIGHTS}")
    if any(config.get(key) != value for key, value in LARGE.items()):
        logger.warning("DINOv2 weights: %s is not ViT-L/14: its numbers are not those of published FD-DINOv2", folder)
    try:
        network, report = Dinov2Model.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True,
            attn_implementation="eager")  # plain products of matrices, which `full_float32` governs
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"DINOv2 weights: {folder}: not those of its config.json ({str(error).splitlines()[0]}); "
                         f"take {WEIGHTS}") from error
    wrong = [f"{len(report[kind])} {kind.replace('_', ' ')} (first: {min(report[kind])})"
             for kind in ("missing_keys", "unexpected_keys") if report[kind]]
    if wrong:  # transformers fills what is missing with random numbers
        raise ValueError(f"DINOv2 weights: {folder}: not those of its config.json: {'; '.join(wrong)}; take {WEIGHTS}")
    return Dinov2(network).to(device)


def find_dinov2(weights: str | Path = WEIGHTS) -> Path:
    """The local folder of the files that `load_dinov2` loads. Downloads as it does; ValueError where they are not."""
    folder = Path(storage.absolute(str(weights)))
    try:
        if not folder.is_dir():
            repository, _, revision = str(weights).partition("@")
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=FILES))
    except (OSError, HFValidationError) as error:
        raise ValueError(f"DINOv2 weights: neither a local folder nor on the hub: {str(weights)!r} "
                         f"({str(error).splitlines()[0]}); fetch {WEIGHTS} with network, or copy its {' and '.join(FILES)} "
                         "into a folder and name that") from error
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"DINOv2 weights: {folder} has no {' and no '.join(missing)}; copy the {' and '.join(FILES)} of "
                         f"{WEIGHTS} there")
    return folder


def hash_dinov2(weights: str | Path = WEIGHTS) -> str:
    """sha256 of the model.safetensors that `load_dinov2` loads, without loading it. Raises ValueError as `find_dinov2`."""
    with (find_dinov2(weights) / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
