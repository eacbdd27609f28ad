"""What a set of images must be before any number is computed of it: as many as said, and no copies, flat pictures or skewed
labels that show a broken sampler. Not a metric.
"""

import hashlib
from dataclasses import dataclass, fields

import numpy as np
import scipy.special

MAX_SHARE = 0.01
"""Share of copies, and of pictures of one colour, from which on the set is refused. (Real data sets hold some of both.)"""
MIN_PROBABILITY = 1e-6
"""Probability of a label histogram at least as uneven, below which labels were not drawn uniformly."""


@dataclass(frozen=True)
class Facts:
    """What the gate looks at, of every image in index order."""

    digests: np.ndarray  # (N,) uint64, equal for equal pictures
    flat: np.ndarray  # (N,) bool, all pixels have one colour
    finite: np.ndarray  # (N,) bool, all features are finite numbers
    labels: np.ndarray  # (N,) int64, -1 without


def digests_of(pictures: np.ndarray) -> np.ndarray:
    """A number for each picture of (N, H, W, 3) uint8, equal for equal ones: (N,) uint64."""
    digests = [hashlib.blake2b(np.ascontiguousarray(p), digest_size=8).digest() for p in pictures]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def flat_of(pictures: np.ndarray) -> np.ndarray:
    """Whether all pixels of a picture have the same colour, (N, H, W, 3) uint8 -> (N,) bool."""
    return (pictures == pictures[:, :1, :1]).all(axis=(1, 2, 3))


def reasons(facts: Facts, *, num_expected: int, num_classes: int = 0, labels: str = "",
            num_rejected: int = 0) -> list[str]:
    """Why a set of images gives no metrics, each with what to look for; empty where it does.

    Args:
        num_expected: images that there must be.
        num_classes: of the model; 0 without labels.
        num_rejected: further ones that could not be read.
        labels: how they were given: `random`, `balanced`, or empty where they may be anything.
    """
    count, found = len(facts.labels), []
    if count != num_expected:
        found.append(f"{count} images, but {num_expected} were asked for; delete the chunks that are short")
    if num_rejected > MAX_SHARE * (count + num_rejected):
        found.append(f"{num_rejected} of {count + num_rejected} pictures could not be read; mend or remove them")
    if not count:
        return found
    if not facts.finite.all():
        count_bad, first = (~facts.finite).sum(), (~facts.finite).argmax()
        found.append(f"the features of {count_bad} images are not finite (first: image {first}); the model diverged, or "
                     "overflowed in half precision: try --precision fp32")
    copies = count - len(np.unique(facts.digests))
    if copies > MAX_SHARE * count:
        found.append(f"{copies} of {count} images are copies of others; look for a seed used twice, or a collapsed model")
    if facts.flat.sum() > MAX_SHARE * count:
        found.append(f"{facts.flat.sum()} of {count} images have one colour only; the model or the autoencoder is broken")
    if num_classes and labels:
        if facts.labels.min() < 0 or facts.labels.max() >= num_classes:
            return [*found, f"labels lie in {facts.labels.min()}..{facts.labels.max()}, but must be in 0..{num_classes - 1}"]
        histogram = np.bincount(facts.labels, minlength=num_classes)  # (num_classes,)
        if labels == "balanced" and histogram.max() - histogram.min() > 1:
            found.append(f"labels = balanced, but classes have {histogram.min()} to {histogram.max()} images")
        # (The distribution of chi-square is known for five or more a class.)
        enough = labels == "random" and num_classes > 1 and count >= 5 * num_classes
        if enough and _probability(histogram) < MIN_PROBABILITY:
            found.append(f"labels = random, but classes have {histogram.min()} to {histogram.max()} images, which chance "
                         f"does not give once in {1 / MIN_PROBABILITY:.0e} times")
    return found


def _probability(histogram: np.ndarray) -> float:
    """That labels drawn uniformly are at least as uneven, by Pearson's chi-square."""
    expected = histogram.mean()
    return float(scipy.special.chdtrc(len(histogram) - 1, ((histogram - expected) ** 2 / expected).sum()))


def joined(parts: list[Facts]) -> Facts:
    """Facts of consecutive parts as one."""
    return Facts(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Facts)})
