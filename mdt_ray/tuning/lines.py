"""A sweep on the terminal: a line for each trial that ends, in columns."""

import re
from collections.abc import Sequence
from typing import Any

from mdt_ray.tuning.space import Point
from mdt_ray.tuning.trials import FINISHED

WIDTH = 10
"""Of a column of numbers, at least."""


def brief(value: Any) -> str:
    """A setting's value as a person would write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def named(point: Point) -> str:
    """`mask_ratio 0.3, decode_layer 2`: the last words of the settings suffice to tell points apart."""
    return ", ".join(f"{key.rpartition('.')[2]} {brief(value)}" for key, value in point.items())


def file_name(point: Point) -> str:
    """`mask_ratio-0.3_decode_layer-2_`: the same as part of a file's name."""
    parts = (f"{key.rpartition('.')[2]}-{brief(value)}" for key, value in point.items())
    return "".join(re.sub(r"[^\w.-]+", "-", part) + "_" for part in parts)


def header(keys: Sequence[str], metric: str) -> str:
    """Of the columns of `line`."""
    names = [key.rpartition(".")[2] for key in keys]
    return "  ".join(f"{name:>{_width(name)}}" for name in [*names, "seed", metric, "loss", "seconds"])


def line(result: dict[str, Any], keys: Sequence[str], metric: str) -> str:
    """A trial that ended: its point, seed, metric, last loss and seconds; or why it has none.

    Args:
        result: its result.json.
        keys: the settings that the space changes.
    """
    columns = [(key.rpartition(".")[2], brief(result["point"].get(key, "-"))) for key in keys]
    columns.append(("seed", str(result["seed"])))
    tail = ""
    if result["status"] == FINISHED:
        columns += [(metric, f"{result['metrics'][metric]:.4g}"), ("loss", f"{result['curve'][-1]['loss']:.4f}"),
                    ("seconds", f"{result['seconds']:.0f}")]
    else:
        tail = f"  {result['status']}: {result['reason']}"
    return "  ".join(f"{value:>{_width(name)}}" for name, value in columns) + tail


def _width(name: str) -> int:
    return max(len(name), WIDTH if name != "seed" else 4)
