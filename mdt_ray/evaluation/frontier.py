"""Settings of a sweep as points of two metrics, and which of them no other beats in both. Not a picture (report/figures.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one setting scored."""

    x: float
    """The metric that should be high, such as the Inception Score."""
    y: float
    """The metric that should be low, such as the FID."""
    group: str
    """Settings that belong together, such as one sampler's; empty where there are no groups."""
    label: str
    """What the setting is within its group, such as `cfg 2.5`."""


def pareto(points: Sequence[Point]) -> list[int]:
    """Places of the points that no other equals or beats in both metrics, by rising x (so y rises as well).

    Of equal points the first counts. Raises ValueError for a point that is not finite.
    """
    for point in points:
        if not (math.isfinite(point.x) and math.isfinite(point.y)):
            raise ValueError(f"points: {point.group} {point.label} has x = {point.x}, y = {point.y}, but both must be "
                             "finite; leave out settings without metrics")
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: (-points[i].x, points[i].y)):  # from the best x down
        if not front or points[place].y < points[front[-1]].y:
            front.append(place)
    return front[::-1]
