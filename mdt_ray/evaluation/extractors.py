"""The table of feature extractors: by name, with weights of the user's choice, and what identifies their numbers.

Not the networks: each has a file of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from mdt_ray import storage
from mdt_ray.config_io import suggestion
from mdt_ray.evaluation import dinov2, inception, small
from mdt_ray.evaluation.features import Extractor


class Kind(NamedTuple):
    """How to come by one extractor. `weights` is None for its default: each file says what may be named."""

    load: Callable[[str | None, str | torch.device], Extractor]
    sha256: Callable[[str | None], str]  # of the weights' file
    image_size: int | None  # the one side it reads; None where it resizes
    transform: str  # how images reach the network


def _small(name: str) -> Kind:
    return Kind(load=lambda weights, device: small.load_small_features(name, weights).to(device),
                sha256=lambda weights: storage.sha256(small.read_small_weights(name, weights)),
                image_size=small.IMAGE_SIZE, transform="as they are")


KINDS = {
    "digits": _small("digits"),
    "fashion": _small("fashion"),
    "inception": Kind(load=lambda weights, device: inception.load_inception(weights, device=device),
                      sha256=lambda weights: inception.read_inception_weights(weights)[1],
                      image_size=None, transform=f"tf1-bilinear-{inception.IMAGE_SIZE}"),
    "dinov2": Kind(load=lambda weights, device: dinov2.load_dinov2(weights or dinov2.WEIGHTS, device),
                   sha256=lambda weights: dinov2.hash_dinov2(weights or dinov2.WEIGHTS),
                   image_size=None, transform=f"bicubic-antialias-{dinov2.IMAGE_SIZE}"),
}


def load_extractor(name: str, weights: str = "", device: str | torch.device = "cpu") -> Extractor:
    """The extractor `name` on `device`, in eval mode and frozen.

    weights: "" for the default, or
        digits, fashion: a file (default: the one in the package);
        inception: a file or an http(s) URL (default: torch.hub's cached copy of `inception.WEIGHTS_URL`);
        dinov2: a local folder or a hub id, `id@revision` (default: `dinov2.WEIGHTS`).

    Raises ValueError for an unknown name, and where the weights are not there or are others, with the remedy.
    """
    return _kind(name).load(weights or None, device)


def weights_hash(name: str, weights: str = "") -> str:
    """First 16 hex digits of the sha256 of the file that `load_extractor` would load, without building the network.

    Downloads and raises ValueError as `load_extractor` does.
    """
    return _kind(name).sha256(weights or None)[:16]


def image_size(name: str) -> int | None:
    """The one side of the images that the extractor reads; None if it resizes. ValueError for an unknown name."""
    return _kind(name).image_size


def transform(name: str) -> str:
    """How images reach the network, in a few words to keep with statistics. ValueError for an unknown name."""
    return _kind(name).transform


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise ValueError(f"extractor = {name!r}: no such extractor{suggestion(name, KINDS)}")
    return KINDS[name]
