"""What a feature extractor is: the shape of its answer and the protocol it follows.

Not an extractor itself: Inception-v3 and the small ones live in files of their own.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Features(NamedTuple):
    """Features of one batch of images, float32; any field may lie on any device.

    pool: (B, D) vectors for FID, precision and recall (Inception's `pool_3`, D = 2048).
    spatial: (B, S) flattened spatial map for sFID (17 * 17 * 7 = 2023 for Inception, in height-width-channel order);
        None from an extractor whose spatial map no published metric uses (DINOv2).
    logits: (B, num_classes), whose softmax is scored by IS (Inception: without bias, 1008 classes); None from an
        extractor without a classifier.

    An extractor fills the same fields for every batch.
    """

    pool: torch.Tensor  # (B, D)
    spatial: torch.Tensor | None  # (B, S)
    logits: torch.Tensor | None  # (B, num_classes)


class Extractor(Protocol):
    """A callable from images to `Features`; any object with these two members will do.

    `name` goes into the metrics' names, so that `fid_digits` is never mistaken for FID.
    """

    name: str

    def __call__(self, images: torch.Tensor) -> Features:
        """Features of `images`, uint8 (B, 3, H, W) in 0..255; image i's do not depend on the rest of the batch."""
        ...


def check_images(images: torch.Tensor) -> None:
    """Raise ValueError for what no extractor that resizes takes: anything but uint8 (B, 3, H, W)."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be torch.uint8 in 0..255, got dtype {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must have shape (B, 3, H, W) with H, W >= 1, got {tuple(images.shape)}")
