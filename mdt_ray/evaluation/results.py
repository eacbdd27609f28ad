"""Chunks of features become metrics: summed up one by one in index order, then compared, and named with their count.

Not the metrics' mathematics: metrics.py and statistics.py.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mdt_ray.evaluation import gate, metrics
from mdt_ray.evaluation.chunks import Chunk
from mdt_ray.evaluation.reference import Reference
from mdt_ray.evaluation.statistics import FeatureStatistics

INCEPTION = "inception"
CLASSIFIERS = ("digits", "fashion")
"""Extractors whose classes are those that the model was asked for. (Inception's 1008 are numbered otherwise.)"""
METRICS = {"inception": {"fid", "sfid", "is", "precision", "recall", "kid"}, "dinov2": {"fid", "precision", "recall", "kid"},
           **{name: {"fid", "sfid", "is", "precision", "recall", "kid", "label_accuracy"} for name in CLASSIFIERS}}
"""What `compare` finds where the reference has its pictures, by extractor."""
OF_PICTURES = {"precision", "recall", "kid"}
"""Those of them for which statistics of the reference do not suffice."""
MAX_REFERENCES = 10_000
"""Real images that precision, recall and KID compare with, as many as the official reference batches hold."""
SPLIT = 5000
"""Images of a split of the Inception Score."""
KID_BLOCKS, KID_BLOCK = 10, 1000
"""Blocks of KID at least, for its interval, and images of a block at most."""


@dataclass(frozen=True)
class Summary:
    """What metrics are computed of: sums over all pictures, and the features that no sum replaces."""

    num_images: int
    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    features: np.ndarray  # (n, D) float32, of all pictures or those asked for
    logits: np.ndarray | None  # (N, num_classes) float32
    facts: gate.Facts
    num_rejected: int
    """Pictures that there should have been too."""
    halves: tuple[FeatureStatistics, FeatureStatistics]
    """Pool features of every other picture, from the first and from the second on."""

    num_kept: int
    """Pictures that the chunks hold."""

    @functools.cached_property
    def distance_between_halves(self) -> float:
        """Frechet distance of even and odd images: of real ones, what a perfect sampler of as few images would score."""
        first, second = self.halves
        return metrics.frechet_distance(first.mean, first.covariance, second.mean, second.covariance)

    @property
    def statistics(self) -> Reference:
        """Mean and covariance of both features."""
        sigma = (self.spatial.mean, self.spatial.covariance) if self.spatial else (None, None)
        return Reference(self.pool.mean, self.pool.covariance, *sigma, facts={"num_images": self.num_images})


def summarise(chunks: Iterable[Chunk], chosen: np.ndarray | None = None) -> Summary:
    """Sum up chunks, in index order, holding one at a time.

    Args:
        chosen: indices of the pictures whose features are kept, without logits: of real images; None keeps all.
    Raises ValueError without any.
    """
    halves: tuple[FeatureStatistics, ...] = ()
    spatial, features, logits, facts, count, num_rejected, num_kept = None, [], [], [], 0, 0, 0
    for chunk in chunks:
        if not halves:
            halves = tuple(FeatureStatistics(chunk.pool.shape[1]) for _ in range(2))
            spatial = None if chunk.spatial is None else FeatureStatistics(chunk.spatial.shape[1])
        places, good = np.arange(count, count + len(chunk.pool)), chunk.finite  # the gate refuses what is left out here
        for parity, half in enumerate(halves):
            half.update(chunk.pool[good & (places % 2 == parity)])
        if spatial is not None:
            spatial.update(chunk.spatial[good])
        features.append(chunk.pool if chosen is None else chunk.pool[np.isin(places, chosen)])
        logits.append(chunk.logits if chosen is None else None)
        num_rejected += int(chunk.num_rejected[0])
        num_kept += len(chunk.images)
        facts.append(chunk.facts)
        count += len(chunk.pool)
    if not count:
        raise ValueError("no pictures to measure")
    pool = FeatureStatistics(halves[0].num_features).merge(halves[0]).merge(halves[1])
    return Summary(num_images=count, pool=pool, spatial=spatial, features=np.concatenate(features),
                   logits=None if logits[0] is None else np.concatenate(logits), facts=gate.joined(facts),
                   num_rejected=num_rejected, num_kept=num_kept, halves=halves)


def compare(samples: Summary, reference: Reference, reference_features: np.ndarray | None, extractor: str,
            adm_float16: bool = False) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics by name, and the 95% intervals of those that have one.

    FID, sFID, IS, precision, recall and KID, as far as the extractor has what they need and the reference its pictures
    (`reference_features`, (n, D)); and, where the extractor classifies what the model was asked for, the share of samples
    that it reads as their label.
    """
    statistics = samples.statistics
    found = {"fid": metrics.frechet_distance(statistics.mu, statistics.sigma, reference.mu, reference.sigma)}
    intervals = {}
    if statistics.mu_s is not None and reference.mu_s is not None:
        found["sfid"] = metrics.frechet_distance(statistics.mu_s, statistics.sigma_s, reference.mu_s, reference.sigma_s)
    if samples.logits is not None:
        # (A split at a time: of all, probabilities in float64 would be twice the logits.)
        found["is"] = float(np.mean([metrics.inception_score(softmax(samples.logits[first:first + SPLIT]))
                                     for first in range(0, samples.num_images, SPLIT)]))
    if reference_features is not None:
        found["precision"], found["recall"] = metrics.precision_recall(reference_features, samples.features,
                                                                         adm_float16=adm_float16)
        smaller = min(len(reference_features), samples.num_images)
        kid = metrics.kernel_distance(reference_features, samples.features,
                                      block_size=min(KID_BLOCK, max(smaller // KID_BLOCKS, 2)))
        found["kid"] = kid.value
        if np.isfinite(kid.low):
            intervals["kid"] = [kid.low, kid.high]
    labels = samples.facts.labels
    if extractor in CLASSIFIERS and (labels >= 0).all():
        found["label_accuracy"] = float((samples.logits.argmax(1) == labels).mean())
    return tuple({metric_name(key, extractor, samples.num_images): value for key, value in values.items()}
                 for values in (found, intervals))


def metric_name(metric: str, extractor: str, num_samples: int) -> str:
    """`fid_50k`, `fd_dinov2_5k`, `fid_digits_300`: another feature network or number of samples is another metric."""
    if extractor != INCEPTION:
        metric = {"fid": "fd", "kid": "kd"}.get(metric, metric) if extractor == "dinov2" else metric
        metric = f"{metric}_{extractor}"
    return f"{metric}_{num_samples // 1000}k" if num_samples % 1000 == 0 else f"{metric}_{num_samples}"


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, K) float64, rows sum to 1."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def over_ranges(values: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, minimum, maximum and standard deviation (ddof 1) of each metric over ranges of seeds."""
    table = {name: np.array([v[name] for v in values]) for name in values[0]}
    rules = {"mean": np.mean, "min": np.min, "max": np.max, "std": lambda x: np.std(x, ddof=1)}
    return {rule: {name: float(of(column)) for name, column in table.items()} for rule, of in rules.items()}
