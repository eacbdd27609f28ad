"""Numbers as people read them: sizes, operations, times, rates. Not a parser."""

import math


def scaled(value: float, unit: str) -> str:
    """`21.3 GB`, `1.246 TFLOP`: powers of 1000, four digits."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.4g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} T{unit}"


def size(num_bytes: float) -> str:
    """`21.3 GB`."""
    return scaled(num_bytes, "B")


def rate(per_second: float) -> str:
    """`12.5`, `2,806`."""
    return f"{per_second:.3g}" if per_second < 100 else f"{per_second:,.0f}"


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `3.4 h`, `5.6 days`."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
