"""Pictures of the report as PNG bytes: curves, image grids, a heat map. No page here, and no global matplotlib state."""

import io
from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator
from matplotlib.transforms import Bbox
from PIL import Image

from mdt_ray.evaluation.frontier import Point, pareto

INK, MUTED, GRID = "#1c2733", "#5b6b7b", "#e3e8ee"
SERIES = ("#2463a8", "#d1602c", "#3a8f5f", "#8a4fa3")
MARKERS = ("o", "s", "^", "D", "v")
"""With the colours, 20 different ones in turn."""
LABEL_DISTANCES = (10, 18, 30, 45, 65)
LABEL_DIRECTIONS = ((1, -0.6), (1, 0), (0.5, -1), (0, -1), (1, 0.6), (-1, -0.6), (-1, 0), (-1, 0.6), (0, 1))
"""Where a point's label is tried, in points: below a front to its right first, where no points are."""


def curves(series: dict[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str,
           log: bool = False, level: tuple[str, float] | None = None) -> bytes:
    """Lines name -> (x, y) in one plot; `level` is a named horizontal line to compare with."""
    figure, axes = new_figure(6.4, 3.4)
    for colour, (name, (x, y)) in zip(SERIES, series.items(), strict=False):
        axes.plot(x, y, color=colour, linewidth=1.8, label=name, marker="o" if len(x) < 12 else None, markersize=4)
    if level:
        axes.axhline(level[1], color=MUTED, linewidth=1.2, linestyle="--", label=level[0])
    if log:
        log_scale(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, fontsize=9)
    return as_png(figure)


def picture(pixels: np.ndarray) -> bytes:
    """One image (H, W, 3) uint8, pixel for pixel."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def grid(rows: Sequence[np.ndarray], labels: Sequence[str], columns: Sequence[str] = (), scale: float = 0.52,
         captions: Sequence[Sequence[str]] = ()) -> bytes:
    """Images in labelled rows: each row is (n, H, W, 3) uint8. `captions` has a text below each."""
    width, height = max(len(r) for r in rows), len(rows)
    line = 0.2 if captions else 0
    figure = Figure(figsize=(scale * width + 1.2, (scale + line) * height + (0.3 if columns else 0.05)), dpi=110)
    axes = figure.subplots(height, width, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.06 + line / scale})
    figure.subplots_adjust(left=1.15 / figure.get_figwidth(), right=1, bottom=line / figure.get_figheight(),
                           top=1 - (0.28 / figure.get_figheight() if columns else 0))
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for j in range(width):
            axes[i, j].set_axis_off()
            if j < len(row):
                axes[i, j].imshow(row[j], interpolation="nearest")
        axes[i, 0].text(-0.12, 0.5, label, transform=axes[i, 0].transAxes, ha="right", va="center", fontsize=9, color=INK)
    for i, row in enumerate(captions):
        for j, caption in enumerate(row):
            axes[i, j].text(0.5, -0.04, caption, transform=axes[i, j].transAxes, ha="center", va="top", fontsize=8,
                            color=MUTED)
    for j, column in enumerate(columns):
        axes[0, j].set_title(column, fontsize=9, color=INK, pad=3)
    return as_png(figure)


def heat_map(x: Sequence[str], y: Sequence[str], values: np.ndarray, x_label: str, y_label: str, title: str) -> bytes:
    """A table of numbers (len(y), len(x)) as coloured cells with the number in each; missing ones are NaN."""
    figure, axes = new_figure(1.3 * len(x) + 2.2, 0.8 * len(y) + 1.5)
    axes.grid(False)
    image = axes.imshow(values, cmap="Blues_r", aspect="auto")
    axes.set_xticks(range(len(x)), x)
    axes.set_yticks(range(len(y)), y)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10, color=INK)
    low, high = np.nanmin(values), np.nanmax(values)
    for i, j in np.ndindex(values.shape):
        if np.isfinite(values[i, j]):
            dark = values[i, j] < (low + high) / 2
            axes.text(j, i, f"{values[i, j]:.4g}", ha="center", va="center", color="white" if dark else INK, fontsize=10)
    figure.colorbar(image, ax=axes, fraction=0.05)
    return as_png(figure)


def frontier(points: Sequence[Point], x_label: str, y_label: str, x_is_cost: bool = False,
             y_is_gain: bool = False) -> bytes:
    """A sweep's settings by two metrics, high x and low y being good: a marker for each group, a line through those that no
    other beats, which have their labels too, and a ring round the one of the lowest y.

    x_is_cost: the points' x are costs, made negative; they are shown as they were.
    y_is_gain: the same of their y.
    Raises ValueError without points, and for one that is not finite.
    """
    if not points:
        raise ValueError("points: none, but at least one is needed; run the sweep first")
    figure, axes = new_figure(7.2, 4.8)
    front = pareto(points)
    best = points[front[0]]
    axes.plot([points[i].x for i in front], [points[i].y for i in front], color=INK, linewidth=1.2, zorder=1)
    for number, group in enumerate(dict.fromkeys(p.group for p in points)):
        members = [p for p in points if p.group == group]
        axes.scatter([p.x for p in members], [p.y for p in members], s=30, color=SERIES[number % len(SERIES)],
                     marker=MARKERS[number % len(MARKERS)], label=group, linewidths=0, zorder=2)
    axes.scatter([best.x], [best.y], s=130, facecolors="none", edgecolors=INK, linewidths=1.4, zorder=3)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_axisbelow(True)
    axes.margins(x=0.12, y=0.12)
    for is_turned, axis in ((x_is_cost, axes.xaxis), (y_is_gain, axes.yaxis)):
        if is_turned:
            axis.set_inverted(True)
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{0.0 - value:g}"))
    if any(p.group for p in points):
        axes.legend(frameon=False, fontsize=9)
    _label(axes, [(points[i].x, points[i].y) for i in front],
           ["best: " + ", ".join(filter(None, (best.group, best.label))),
            *(points[i].label for i in front[1:])], [(p.x, p.y) for p in points])
    return as_png(figure)


def _label(axes: Axes, places: Sequence[tuple[float, float]], texts: Sequence[str],
           taken: Sequence[tuple[float, float]]) -> None:
    """Write a text beside each place of a line, the first ones first, where it covers neither the line, nor points that are
    `taken`, nor another text or its leader, and its own leader no text or point; one that finds no room is left out."""
    _as_written(axes.figure)
    axes.figure.draw_without_rendering()  # settles the layout: from here on pixels can be compared
    frame, line = axes.get_window_extent(), axes.transData.transform(places)  # (n, 2)
    markers = [_spot(pixel) for pixel in axes.transData.transform(taken)]
    lines = [_spot(pixel) for start, stop in pairwise(line) for pixel in np.linspace(start, stop, 20)]
    written = [axes.get_legend().get_window_extent()] if axes.get_legend() else []
    for place, pixel, text in zip(places, line, texts, strict=True):
        for distance, direction in product(LABEL_DISTANCES, LABEL_DIRECTIONS):
            offset = distance * np.array(direction)
            note = axes.annotate(text, place, offset, textcoords="offset points", fontsize=8, color=INK, va="center",
                                 ha=("right", "center", "left")[1 + int(np.sign(offset[0]))], parse_math=False)
            note.set_in_layout(False)
            box = note.get_window_extent().padded(2)
            leader = [_spot(p) for p in np.linspace(pixel, pixel + offset * axes.figure.dpi / 72, 20)]
            crossing = any(spot.count_overlaps(markers + written) for spot in leader if not spot.overlaps(_spot(pixel)))
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not crossing and not box.count_overlaps(markers + lines + written):
                axes.annotate("", place, offset, textcoords="offset points", zorder=1, arrowprops={
                    "arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 2, "shrinkB": 0}).set_in_layout(False)
                written.append(box)
                lines += leader
                break
            note.remove()


def _spot(pixel: np.ndarray) -> Bbox:
    """What a marker takes there."""
    return Bbox.from_bounds(*(pixel - 4), 8, 8)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A plot in the report's style, of so many inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.grid(True, color=GRID, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    return figure, axes


def log_scale(axes: Axes) -> None:
    """Of y, with plain numbers."""
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.tick_params(which="minor", colors=MUTED, labelsize=9, length=0)


def as_png(figure: Figure) -> bytes:
    """The same bytes for the same picture."""
    _as_written(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _as_written(figure: Figure) -> None:
    """No text is TeX: names of classes and settings come from outside, and may hold dollar signs."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
