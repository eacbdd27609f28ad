"""Pictures of a sweep as PNG bytes: learning curves, values with intervals, parallel coordinates. Not the page: sweep.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps

from mdt_ray.report.figures import GRID, MUTED, SERIES, as_png, log_scale, new_figure
from mdt_ray.tuning.lines import brief
from mdt_ray.tuning.space import are_numbers

SHADES = "viridis"
"""From the best point (dark) to the worst (bright)."""


@dataclass(frozen=True)
class Curve:
    """A line of a picture."""

    x: Sequence[float]
    y: Sequence[float]
    name: str = ""
    """For the legend."""
    rank: float = 0.0
    """0 for the best, 1 for the worst."""
    stopped: bool = False
    """Ended early, which a cross marks."""
    half_widths: Sequence[float | None] = ()
    """Of the intervals of y."""


def learning(curves: Sequence[Curve], x_label: str, y_label: str) -> bytes:
    """All trials' curves, shaded by rank, the early ends marked."""
    figure, axes = new_figure(6.4, 3.6)
    for curve in sorted(curves, key=lambda c: -c.rank):  # the best on top
        axes.plot(curve.x, curve.y, color=_shade(curve.rank), linewidth=1.2, alpha=0.85)
        if curve.stopped:
            axes.plot(curve.x[-1:], curve.y[-1:], color=_shade(curve.rank), marker="x", markersize=7, markeredgewidth=1.8)
    log_scale(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return as_png(figure)


def bands(curves: Sequence[Curve], x_label: str, y_label: str) -> bytes:
    """A line a point of the space, with the intervals of its means."""
    figure, axes = new_figure(6.4, 3.6)
    for number, curve in enumerate(curves):
        colour = SERIES[number % len(SERIES)] if len(curves) <= len(SERIES) else _shade(curve.rank)
        axes.plot(curve.x, curve.y, color=colour, linewidth=1.8, label=curve.name, marker="o", markersize=4)
        if curve.half_widths and None not in curve.half_widths:
            low, high = (np.array(curve.y) + sign * np.array(curve.half_widths) for sign in (-1, 1))
            axes.fill_between(curve.x, np.maximum(low, 1e-12), high, color=colour, alpha=0.15, linewidth=0)
    log_scale(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if len(curves) <= 12:
        axes.legend(frameon=False, fontsize=9)
    return as_png(figure)


def values(choices: Sequence[Any], means: Sequence[float], half_widths: Sequence[float | None], x_label: str,
           y_label: str) -> bytes:
    """One setting's values in their order, joined where they are numbers, with intervals where there are any."""
    figure, axes = new_figure(max(4.0, 0.7 * len(choices) + 2), 3.4)
    axes.errorbar(range(len(choices)), means, yerr=[h or 0.0 for h in half_widths], color=SERIES[0], marker="o",
                  markersize=5, linewidth=1.4 if are_numbers(choices) else 0, elinewidth=1.4, capsize=4)
    axes.set_xticks(range(len(choices)), [brief(value) for value in choices])
    axes.margins(x=0.1, y=0.15)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return as_png(figure)


def parallel(keys: Sequence[str], points: Sequence[dict[str, Any]], scores: Sequence[float], metric: str) -> bytes:
    """Parallel coordinates: an axis a setting and one for the metric, a line a point, shaded by rank (best first in points).

    Numbers lie by their size, other values in the order of their names.
    """
    figure, axes = new_figure(max(5.0, 1.6 * (len(keys) + 1)), 3.6)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    columns = [[point.get(key) for point in points] for key in keys] + [list(scores)]
    heights = []
    for place, column in enumerate(columns):
        ticks, height = _heights(column)
        heights.append(height)
        axes.axvline(place, color=GRID, linewidth=1.2, zorder=0)
        for name, at in ticks:
            axes.annotate(name, (place, at), (4, 0), textcoords="offset points", fontsize=8, color=MUTED, va="center",
                          bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}, zorder=3)
    for rank in reversed(range(len(points))):
        axes.plot(range(len(columns)), [height[rank] for height in heights], color=_shade(rank / max(len(points) - 1, 1)),
                  linewidth=2.0 if rank == 0 else 1.1, alpha=0.9)
    axes.set_xticks(range(len(columns)), [key.rpartition(".")[2] for key in keys] + [metric])
    axes.set_yticks([])
    axes.margins(x=0.1, y=0.08)
    return as_png(figure)


def _heights(column: list[Any]) -> tuple[list[tuple[str, float]], list[float]]:
    """Ticks, and each value's place on an axis from 0 to 1."""
    numeric = are_numbers(column)
    known = sorted(set(column)) if numeric else sorted({str(value) for value in column})
    if numeric and len(known) > 6:
        low, high = known[0], known[-1]
        places = [(value - low) / (high - low) for value in column]
        return [(f"{low + share * (high - low):.4g}", share) for share in (0.0, 0.5, 1.0)], places
    spread = {value: number / max(len(known) - 1, 1) for number, value in enumerate(known)}
    return ([(f"{value:g}" if numeric else str(value), at) for value, at in spread.items()],
            [spread[value if numeric else str(value)] for value in column])


def _shade(rank: float) -> Any:
    return colormaps[SHADES](0.05 + 0.8 * rank)
