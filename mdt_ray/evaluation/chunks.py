"""An evaluation's unit of work: pictures of a range of indices become one file of features. Not the metrics: results.py.

No Ray: jobs/stages.py hands the ranges out. Files are safetensors: the arrays of `Chunk`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from mdt_ray import storage
from mdt_ray.config import EvaluateConfig
from mdt_ray.data import listings
from mdt_ray.evaluation import extractors, gate
from mdt_ray.evaluation.features import Extractor

FORMAT = 3
"""Of a chunk's file, part of the identity of evaluations: older chunks hold other arrays."""
BATCH_SIZE = 64
"""Pictures per call of the feature network: Inception's activations of more would not fit a laptop."""


@dataclass(frozen=True)
class Chunk:
    """Features of n pictures in index order, and some of the pictures."""

    pool: np.ndarray  # (n, D) float32
    labels: np.ndarray  # (n,) int64, -1 without
    digests: np.ndarray  # (n,) uint64
    flat: np.ndarray  # (n,) bool
    num_rejected: np.ndarray  # (1,) int64, pictures of the range that could not be read
    images: np.ndarray  # (k, H, W, 3) uint8
    spatial: np.ndarray | None = None  # (n, S) float32
    logits: np.ndarray | None = None  # (n, num_classes) float32
    latents: np.ndarray | None = None  # (k, C, h, w) float32, of drawn pictures

    @property
    def finite(self) -> np.ndarray:
        """Whether all features of a picture are finite numbers, (n,) bool."""
        arrays = [x for x in (self.pool, self.spatial, self.logits) if x is not None]
        return np.stack([np.isfinite(x).all(axis=1) for x in arrays]).all(axis=0)

    @property
    def facts(self) -> gate.Facts:
        return gate.Facts(digests=self.digests, flat=self.flat, finite=self.finite, labels=self.labels)


def check_extractor(name: str, image_size: int) -> None:
    """Raise ValueError if the extractor does not read images of that size."""
    size = extractors.image_size(name) or image_size
    if size != image_size:
        raise ValueError(f"extractor = {name!r}: reads {size}x{size} images, but these are {image_size}x{image_size}; "
                         "choose the extractor made for this data set")


@torch.inference_mode()
def measure(extractor: Extractor, pictures: np.ndarray, labels: np.ndarray, kept: np.ndarray,
            latents: np.ndarray | None = None, num_rejected: int = 0) -> Chunk:
    """Features of (n, H, W, 3) uint8 pictures.

    Args:
        kept: rows of the pictures to keep.
        latents: of those rows, (k, C, h, w).
        num_rejected: pictures that there should have been too.
    """
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)  # (n, 3, H, W)
    parts = [extractor(part) for part in pixels.split(BATCH_SIZE)]

    def joined(name: str) -> np.ndarray | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found).cpu().numpy()

    return Chunk(pool=joined("pool"), spatial=joined("spatial"), logits=joined("logits"), labels=labels,
                 digests=gate.digests_of(pictures), flat=gate.flat_of(pictures), num_rejected=np.array([num_rejected]),
                 images=pictures[kept], latents=latents)


def write_chunk(uri: str, chunk: Chunk) -> None:
    arrays = {name: np.ascontiguousarray(value) for name, value in vars(chunk).items() if value is not None}
    storage.write_bytes(uri, save_safetensors(arrays))


def read_chunk(uri: str) -> Chunk:
    """Raises FileNotFoundError, and ValueError naming a damaged file."""
    data = storage.read_bytes(uri)
    try:
        return Chunk(**load_safetensors(data))
    except Exception as error:  # SafetensorError is no ValueError
        raise ValueError(f"{uri}: damaged ({error}); delete it and run the same command again") from error


def uris_of(config: EvaluateConfig) -> list[str]:
    """Files of an evaluation's chunks in index order; of several ranges of seeds, of the first."""
    folder = storage.join(config.output, f"seeds-{config.seed}") if config.num_seed_ranges > 1 else config.output
    folder = storage.join(folder, "chunks")
    return [storage.join(folder, name) for name in storage.list_names(folder) if name.endswith(".safetensors")]


def kept_rows(start: int, stop: int, num_kept: int, total: int | None = None) -> np.ndarray:
    """Which of pictures start..stop are kept, as rows of that range: those below num_kept, or (with `total`) of as many
    spread over all by a fixed shuffle."""
    if total is None:
        return np.arange(max(min(num_kept, stop) - start, 0))
    chosen = spread(total, num_kept)
    return chosen[(chosen >= start) & (chosen < stop)] - start


def spread(total: int, count: int) -> np.ndarray:
    """At most `count` of range(total), chosen by a fixed shuffle, in order."""
    return np.sort(listings.shuffled(total)[:count])


def kept_images(uris: list[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` kept images (n, H, W, 3) uint8 and their labels (n,). For chunks that keep their first pictures."""
    found = _first_kept(uris, count)
    pictures = np.concatenate([chunk.images for chunk in found])[:count]
    return pictures, np.concatenate([chunk.labels[:len(chunk.images)] for chunk in found])[:count]


def kept_latents(uris: list[str], count: int) -> np.ndarray:
    """Scaled latents of the same pictures, (n, C, h, w) float32. For chunks of drawn pictures."""
    return np.concatenate([chunk.latents for chunk in _first_kept(uris, count)])[:count]


def _first_kept(uris: list[str], count: int) -> list[Chunk]:
    """As few chunks as hold the first `count` kept pictures."""
    found: list[Chunk] = []
    for uri in uris:
        if found and sum(len(chunk.images) for chunk in found) >= count:
            break
        found.append(read_chunk(uri))
    return found
