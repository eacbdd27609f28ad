"""An evaluation's unit of work: a range of images becomes one file of features, and the files become metrics.

No Ray: jobs/evaluate.py hands the ranges out. Files are safetensors: the arrays of `Measured`, and the first images.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from mdt_ray import storage
from mdt_ray.config import EvaluateConfig
from mdt_ray.data import images
from mdt_ray.data.readers import Piece
from mdt_ray.evaluation import gate, metrics
from mdt_ray.evaluation.digits import IMAGE_SIZE, load_digits_features
from mdt_ray.evaluation.features import Extractor
from mdt_ray.evaluation.statistics import FeatureStatistics
from mdt_ray.inference.sampler import Sampler, labels_of

FORMAT = 2
"""Of a chunk's file, part of the identity of evaluations: older chunks hold other arrays."""
EXTRACTORS = {"digits": load_digits_features}
IMAGE_SIZES = {"digits": IMAGE_SIZE}
"""Side of the images that an extractor reads; absent for one that resizes by itself."""


@dataclass(frozen=True)
class Measured:
    """Features of images in index order."""

    pool: np.ndarray  # (N, D) float32
    spatial: np.ndarray  # (N, S) float32
    logits: np.ndarray  # (N, num_classes) float32
    labels: np.ndarray  # (N,) int64
    digests: np.ndarray  # (N,) uint64
    flat: np.ndarray  # (N,) bool

    @property
    def facts(self) -> gate.Facts:
        finite = np.stack([np.isfinite(x).all(axis=1) for x in (self.pool, self.spatial, self.logits)]).all(axis=0)
        return gate.Facts(digests=self.digests, flat=self.flat, finite=finite, labels=self.labels)


def check_extractor(name: str, image_size: int) -> None:
    """Raise ValueError if the extractor does not read images of that size."""
    if IMAGE_SIZES.get(name, image_size) != image_size:
        raise ValueError(f"extractor = {name!r}: reads {IMAGE_SIZES[name]}x{IMAGE_SIZES[name]} images, but these are "
                         f"{image_size}x{image_size}; choose the extractor made for this data set")


@torch.inference_mode()
def measure(extractor: Extractor, pictures: torch.Tensor, labels: torch.Tensor, num_kept: int,
            batch_size: int = 250) -> dict[str, np.ndarray]:
    """Features of (N, 3, H, W) uint8 as the arrays of a chunk's file, with the first `num_kept` pictures as (n, H, W, 3)."""
    parts = [extractor(part) for part in pictures.split(batch_size)]
    arrays = {name: torch.cat([getattr(p, name) for p in parts]).cpu().numpy() for name in ("pool", "spatial", "logits")}
    arrays["labels"] = labels.numpy()
    pixels = np.ascontiguousarray(pictures.permute(0, 2, 3, 1).numpy())  # (N, H, W, 3)
    arrays |= {"digests": gate.digests_of(pixels), "flat": gate.flat_of(pixels)}
    arrays["images"] = pixels[:max(num_kept, 0)].copy()
    return arrays


def sample_chunk(sampler: Sampler, extractor: Extractor, config: EvaluateConfig, start: int,
                 stop: int) -> dict[str, np.ndarray]:
    """Draw images start..stop and measure them."""
    labels = labels_of(start, stop, sampler.num_classes, config.labels, config.seed)
    pictures = [sampler.draw(start + first, part, config.seed)
                for first, part in zip(range(0, stop - start, config.sample_batch_size),
                                       labels.split(config.sample_batch_size), strict=True)]
    return measure(extractor, torch.cat(pictures), labels, config.keep_images - start)


def reference_chunk(extractor: Extractor, piece: Piece, image_size: int, num_kept: int) -> dict[str, np.ndarray]:
    """Measure real images; ones that cannot be read are left out."""
    found = images.decode_piece(piece, image_size)
    return measure(extractor, torch.from_numpy(found.images).permute(0, 3, 1, 2), torch.tensor(found.labels), num_kept)


def write_chunk(uri: str, arrays: dict[str, np.ndarray]) -> None:
    storage.write_bytes(uri, save_safetensors(arrays))


def read_chunks(uris: list[str]) -> Measured:
    """The features of all chunks, in the order given."""
    parts = [load_safetensors(storage.read_bytes(uri)) for uri in uris]
    return Measured(**{f.name: np.concatenate([p[f.name] for p in parts]) for f in fields(Measured)})


def kept_images(uris: list[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` kept images (n, H, W, 3) uint8 and their labels (n,), from as few chunks as needed."""
    pictures, labels, missing = [], [], count
    for uri in uris:
        if missing <= 0:
            break
        arrays = load_safetensors(storage.read_bytes(uri))
        taken = arrays["images"][:missing]
        pictures.append(taken)
        labels.append(arrays["labels"][:len(taken)])
        missing -= len(taken)
    return np.concatenate(pictures), np.concatenate(labels)


def compute_metrics(samples: Measured, reference: Measured, extractor: str) -> dict[str, float]:
    """FID, sFID, IS, precision, recall in the extractor's features, named after it; and, for images of asked classes, the
    share that its classifier reads as the label asked for."""
    def frechet(name: str) -> float:
        return frechet_between(getattr(samples, name), getattr(reference, name))

    precision, recall = metrics.precision_recall(reference.pool, samples.pool)
    found = {"fid": frechet("pool"), "sfid": frechet("spatial"), "is": metrics.inception_score(softmax(samples.logits)),
             "precision": precision, "recall": recall}
    if (samples.labels >= 0).all():
        found["label_accuracy"] = float((samples.logits.argmax(1) == samples.labels).mean())
    return {f"{name}_{extractor}": value for name, value in found.items()}


def frechet_between(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D)."""
    first, second = (FeatureStatistics(x.shape[1]).update(x) for x in (a, b))
    return metrics.frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, K) float64, rows sum to 1."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def distance_between_halves(reference: Measured) -> float:
    """Frechet distance between even and odd real images: what a perfect sampler of as few images would score."""
    return frechet_between(reference.pool[::2], reference.pool[1::2])


def describe_metrics(config: EvaluateConfig, values: dict[str, float], facts: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics.json: the numbers and all that identifies them."""
    return {"metrics": values, "num_samples": config.num_samples, "seed": config.seed, "labels": config.labels,
            "sampling": vars(config.sampling), "precision": config.precision, "extractor": config.extractor, **facts}
