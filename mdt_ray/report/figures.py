"""Pictures of the report as PNG bytes: curves, image grids, a heat map. No page here, and no global matplotlib state."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image

INK, MUTED, GRID = "#1c2733", "#5b6b7b", "#e3e8ee"
SERIES = ("#2463a8", "#d1602c", "#3a8f5f", "#8a4fa3")


def curves(series: dict[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str,
           log: bool = False, level: tuple[str, float] | None = None) -> bytes:
    """Lines name -> (x, y) in one plot; `level` is a named horizontal line to compare with."""
    figure, axes = _figure(6.4, 3.4)
    for colour, (name, (x, y)) in zip(SERIES, series.items(), strict=False):
        axes.plot(x, y, color=colour, linewidth=1.8, label=name, marker="o" if len(x) < 12 else None, markersize=4)
    if level:
        axes.axhline(level[1], color=MUTED, linewidth=1.2, linestyle="--", label=level[0])
    if log:
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


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
    return _png(figure)


def heat_map(x: Sequence[str], y: Sequence[str], values: np.ndarray, x_label: str, y_label: str, title: str) -> bytes:
    """A table of numbers (len(y), len(x)) as coloured cells with the number in each; missing ones are NaN."""
    figure, axes = _figure(1.3 * len(x) + 2.2, 0.8 * len(y) + 1.5)
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
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Figure, "object"]:
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
