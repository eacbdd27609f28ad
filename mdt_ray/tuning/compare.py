"""What trials say once some of them differ in nothing but the seed: means with intervals, and which differences are larger
than the noise.

Trials of one seed saw the same images, noise and masks in the same order, so that differences are taken seed by seed: what
the seed does to both cancels.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdt_ray.evaluation.metrics import half_width
from mdt_ray.tuning.space import Point, are_numbers

BINS = 4
"""Of numbers that are nearly all different."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half the width of its interval by Student's t; None where one seed tells nothing of it."""

    mean: float
    half_width: float | None
    num_seeds: int

    @property
    def is_noise(self) -> bool | None:
        """Of a difference: whether its interval holds 0. None where there is no interval."""
        return None if self.half_width is None else abs(self.mean) <= self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of values that differ by chance, one at least."""
    found = np.asarray(values, np.float64)
    if found.size < 2:
        return Estimate(float(found.mean()), None, found.size)
    return Estimate(float(found.mean()), half_width(found), found.size)


@dataclass(frozen=True)
class Row:
    """A point of the space: its values by seed, their mean, and how it differs from the best point."""

    point: Point
    values: dict[int, float]
    estimate: Estimate
    to_best: Estimate | None
    """Of the paired differences; None for the best point itself, and without a seed that both have."""


def ranked(results: Sequence[Mapping[str, Any]], metric: str, mode: str) -> list[Row]:
    """Points of finished trials, the best mean first; of equal ones the first stays first.

    Args:
        results: each with `point`, `seed` and `metrics`, which have `metric`.
        mode: `min` or `max`, which is better.
    """
    values: dict[str, dict[int, float]] = defaultdict(dict)
    points: dict[str, Point] = {}
    for result in results:
        key = repr(sorted(result["point"].items()))
        points[key] = result["point"]
        values[key][result["seed"]] = result["metrics"][metric]
    sign = -1 if mode == "max" else 1
    order = sorted(points, key=lambda key: sign * float(np.mean(list(values[key].values()))))
    return [Row(points[key], values[key], estimate(list(values[key].values())),
                difference(values[key], values[order[0]]) if key != order[0] else None) for key in order]


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> Estimate | None:
    """Mean of values less others over the seeds that both have."""
    shared = sorted(values.keys() & others.keys())
    return estimate([values[seed] - others[seed] for seed in shared]) if shared else None


def reached(x: Sequence[float], y: Sequence[float], level: float, mode: str = "min") -> float | None:
    """Where a curve first is as good as a level, on straight lines between its points; None where it never is."""
    sign = -1 if mode == "max" else 1
    good = [sign * (value - level) <= 0 for value in y]
    if True not in good:
        return None
    first = good.index(True)
    if first == 0:
        return float(x[0])
    return float(np.interp(0.0, [-sign * (y[first - 1] - level), -sign * (y[first] - level)], [x[first - 1], x[first]]))


def importance(scores: Sequence[tuple[Point, float]]) -> dict[str, float]:
    """Share of the variance between points that the mean over each setting's values explains, by setting, largest first.

    Main effects only: what two settings do together counts for neither. Of settings that take one value, nothing. Numbers of
    which most are different, such as draws from a range, are taken in BINS parts of equal count.
    """
    means = np.array([mean for _, mean in scores])
    total = means.var()
    shares = {}
    for key in dict.fromkeys(key for point, _ in scores for key in point):
        groups: dict[str, list[float]] = defaultdict(list)
        for level, mean in zip(_levels([point.get(key) for point, _ in scores]), means, strict=True):
            groups[level].append(mean)
        if len(groups) > 1:
            between = sum(len(group) * (np.mean(group) - means.mean()) ** 2 for group in groups.values()) / len(means)
            shares[key] = float(between / total) if total > 0 else 0.0
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _levels(values: list[Any]) -> list[str]:
    """What values are grouped by."""
    if not are_numbers(values) or 2 * len(set(values)) <= len(values) or len(values) <= BINS:
        return [repr(value) for value in values]
    ranks = np.argsort(np.argsort(values, kind="stable"))
    return [str(rank * BINS // len(values)) for rank in ranks]
