"""The feature network of a small data set: a convolutional classifier of 32x32 pictures, frozen once trained.

Its metrics carry its data set's name (`fid_digits`, `fid_fashion`): they compare runs on that data set with each other and
never with Inception's FID. `scripts/make_assets.py` and `make_fashion.py` train it and wrote the weights in the package.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from mdt_ray import storage
from mdt_ray.data.sources import ASSETS
from mdt_ray.evaluation.features import Features

# B batch, D pool features, S spatial features. The one image size it knows is 32.
IMAGE_SIZE = 32
NUM_CLASSES = 10
NUM_POOL = 64  # D
NUM_SPATIAL_CHANNELS = 8  # S = 8 * 4 * 4 = 128, as sFID takes the first 7 channels of Inception's 17x17 map
WIDTHS = (24, 48, 48)
REMEDY = "name no file to take the one in the package"


def is_held_out(index: int) -> bool:
    """Whether row `index` of digits.parquet was kept from the training of the embedded VAE and feature network.

    Every fifth row: each class and most writers occur on both sides, and no list has to be shipped.
    """
    return index % 5 == 0


class SmallFeatures(nn.Module):
    """Images in, `Features` out: pool (B, 64), spatial (B, 128), logits (B, 10), float32.

    Group norm and no batch statistics, so an image's features do not depend on its batch. `pool` is taken before the
    last non-linearity and every activation is smooth: no unit can be dead, so the covariance keeps its full rank.
    """

    def __init__(self, name: str = "digits") -> None:
        super().__init__()
        self.name = name
        c1, c2, c3 = WIDTHS
        self.conv1 = nn.Conv2d(3, c1, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(4, c1)
        self.conv2 = nn.Conv2d(c1, c2, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(4, c2)
        self.conv3 = nn.Conv2d(c2, c3, 3, stride=2, padding=1)
        self.norm3 = nn.GroupNorm(4, c3)
        self.pool = nn.Linear(c3 * 4 * 4, NUM_POOL)
        self.head = nn.Linear(NUM_POOL, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> Features:
        """Features of uint8 `images` (B, 3, 32, 32) in 0..255. ValueError on any other dtype or shape."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be torch.uint8 in 0..255, got dtype {images.dtype}")
        expected = (3, IMAGE_SIZE, IMAGE_SIZE)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must have shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        x = images.to(device=self.head.weight.device, dtype=torch.float32) / 127.5 - 1
        return self.features(x)

    def features(self, x: torch.Tensor) -> Features:
        """The same from float images in [-1, 1]; a path for gradients, which uint8 has not (training uses it)."""
        x = F.silu(self.norm1(self.conv1(x)))  # (B, 24, 16, 16)
        x = F.silu(self.norm2(self.conv2(x)))  # (B, 48, 8, 8)
        x = self.norm3(self.conv3(x))  # (B, 48, 4, 4)
        spatial = x[:, :NUM_SPATIAL_CHANNELS].flatten(1)  # (B, S)
        pool = self.pool(F.silu(x).flatten(1))  # (B, D)
        return Features(pool, spatial, self.head(F.silu(pool)))  # logits: (B, 10)


def load_small_features(name: str = "digits", weights: str | Path | None = None) -> SmallFeatures:
    """The trained network of a data set, in eval mode and without gradients; from the package, or a file that `storage`
    opens.

    Raises ValueError, naming the file, if it is not there or holds no weights of this network.
    """
    network = SmallFeatures(name)
    try:
        network.load_state_dict(load(read_small_weights(name, weights)))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{name} weights: {weights or 'the file in the package'}: no safetensors file of this network "
                         f"({str(error).splitlines()[0]}); {REMEDY}") from error
    return network.eval().requires_grad_(False)


def read_small_weights(name: str, weights: str | Path | None = None) -> bytes:
    """The file that `load_small_features` loads. Raises ValueError if it cannot be read."""
    path = str(weights or ASSETS / name / "features.safetensors")
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise ValueError(f"{name} weights: cannot read {path} ({error}); {REMEDY}") from error
