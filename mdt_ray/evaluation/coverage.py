"""Which points lie in the k-nearest-neighbour balls of another set, block by block: what precision and recall count.

Exact and yet fast: products in low precision give every squared distance a lower bound, and only the few pairs that may be
near are computed in float64. No metric: metrics.py has those, and checks what comes in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

DENSE_SHARE = 1 / 64
"""Of a block's pairs: from here on all of them by one product in float64 take less time than these one by one."""
CHUNK_VALUES = 2**16
"""Float64 values of such pairs in hand at a time, few enough for the cache."""


def coverage(ref: np.ndarray, samples: np.ndarray, k: int, block_size: int,
             screen: torch.dtype | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Whether each sample is in a ball of `ref`, and each of `ref` in a ball of the samples: (M,) and (N,) bool.

    ref: (N, D), samples: (M, D), finite, with more than k rows. `screen` is the dtype of the products that sort out far
    pairs, torch.float32 or torch.bfloat16 (by default where the hardware multiplies it); the result does not depend on it.
    """
    # A power of two is exact in any sum and keeps squares of huge or tiny features inside float32.
    exponent = min(-int(np.frexp(max(_largest(ref), _largest(samples)))[1]), 1023)
    centre = ref.mean(axis=0, dtype=np.float64) * 2.0**exponent  # (D,)
    a, b = (_Points(x, exponent, centre, block_size, screen or screen_dtype()) for x in (ref, samples))
    reach = _radii(a, k, block_size), _radii(b, k, block_size)  # (N,), (M,)
    inside = np.zeros(len(samples), dtype=bool), np.zeros(len(ref), dtype=bool)
    for rows, columns in itertools.product(blocks(len(ref), block_size), blocks(len(samples), block_size)):
        bounds = _half_bounds(a, rows, b, columns)  # (n, m)
        limits, found = (reach[0][rows], reach[1][columns]), (inside[0][columns], inside[1][rows])
        for axis in (0, 1):  # balls round the rows, which cover columns, then the other way round
            pairs = _candidates(bounds, limits[axis], axis)  # (2, P)
            pairs = pairs[:, ~found[axis][pairs[1 - axis]]]
            close = _squared_distances(a, rows, b, columns, pairs) <= limits[axis][pairs[axis]]  # (P,)
            found[axis][pairs[1 - axis][close]] = True
    return inside


def screen_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it, which takes about half the time, else float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def blocks(count: int, block_size: int) -> Iterator[slice]:
    """Slices that cover range(count) in runs of `block_size`."""
    return (slice(start, min(start + block_size, count)) for start in range(0, count, block_size))


class _Points:
    """A set of points, with what bounds its distances to another one of the same exponent and centre.

    A coordinate counts as its value times 2^exponent. Attributes: points (N, D) as given; norms (N,) of |x|^2; screen (N, D)
    of x - centre in low precision; halves (N,) of |x - centre|^2 / 2, less its share of the error of `_half_bounds`.
    """

    def __init__(self, points: np.ndarray, exponent: int, centre: np.ndarray, block_size: int, dtype: torch.dtype):
        self.points, self.scale = points, 2.0**exponent
        count, width = points.shape
        self.norms, self.halves = np.empty(count), np.empty(count, dtype=np.float32)
        self.screen = torch.empty(count, width, dtype=dtype)
        # Relative to (|a|^2 + |b|^2) / 2 >= |a b|, with the unit roundoff u = eps / 2 of a dtype: u of each factor's cast,
        # D u of float32's sum of products (Higham 2002, section 3.1), u of a cast of the sum; u of each norm's cast and of
        # two additions. That is (D + 6) u in float32 and 3 u more in bfloat16, with squares of u; the former is doubled.
        error = (width + 8) * torch.finfo(torch.float32).eps
        if dtype == torch.bfloat16:
            error += 1.5 * torch.finfo(dtype).eps + torch.finfo(dtype).eps ** 2
        for rows in blocks(count, block_size):
            scaled = self.exact(rows)  # (n, D)
            self.norms[rows] = np.vecdot(scaled, scaled)
            scaled -= centre
            self.halves[rows] = np.vecdot(scaled, scaled) * ((1 - error) / 2) - 2.0**-100  # (what underflows)
            self.screen[rows] = torch.from_numpy(scaled)

    def exact(self, index: slice | np.ndarray) -> np.ndarray:
        """Those points in float64, (n, D)."""
        chosen = self.points[index].astype(np.float64)
        chosen *= self.scale
        return chosen


def _radii(points: _Points, k: int, block_size: int) -> np.ndarray:
    """Squared distance of every point to its k-th neighbour, itself the 0th; (N,) float32."""
    nearest = np.full((len(points.norms), k + 1), np.inf, dtype=np.float32)  # (N, k + 1), the smallest so far
    runs = list(blocks(len(nearest), block_size))
    for rows in runs:  # first these: a row that has k + 1 distances has few candidates left
        bounds = _half_bounds(points, rows, points, rows)  # (n, n)
        if len(bounds) > k:
            picked = np.argpartition(bounds, k, axis=1)[:, :k + 1]  # (n, k + 1)
            pairs = np.stack([np.repeat(np.arange(len(bounds)), k + 1), picked.ravel()])
            nearest[rows] = _squared_distances(points, rows, points, rows, pairs).reshape(-1, k + 1)
            np.put_along_axis(bounds, picked, np.inf, axis=1)
        _keep_nearer(nearest[rows], points, rows, rows, bounds, 0)
    for rows, columns in itertools.combinations(runs, 2):  # distances are symmetric: half of all blocks do
        bounds = _half_bounds(points, rows, points, columns)  # (n, m)
        _keep_nearer(nearest[rows], points, rows, columns, bounds, 0)
        _keep_nearer(nearest[columns], points, rows, columns, bounds, 1)
    return nearest.max(axis=1)


def _keep_nearer(nearest: np.ndarray, points: _Points, rows: slice, columns: slice, bounds: np.ndarray, axis: int) -> None:
    """Put a block's distances into the smallest ones of its rows (axis 0) or columns (axis 1), (n, k + 1), in place."""
    limits = nearest.max(axis=1)
    pairs = _candidates(bounds, np.where(limits > 0, limits, -np.inf), axis)  # (2, P), and nothing is nearer than 0
    if not pairs.size:
        return
    pairs = pairs[:, np.argsort(pairs[axis], kind="stable")]
    changed, starts, counts = np.unique(pairs[axis], return_index=True, return_counts=True)  # (c,) each
    more = np.full((len(changed), counts.max()), np.inf, dtype=np.float32)  # (c, most of a row), the distances by row
    place = np.arange(pairs.shape[1]) - np.repeat(starts, counts)  # (P,)
    more[np.repeat(np.arange(len(changed)), counts), place] = _squared_distances(points, rows, points, columns, pairs)
    count = nearest.shape[1]
    both = np.concatenate([nearest[changed], more], axis=1)
    nearest[changed] = np.partition(both, count - 1, axis=1)[:, :count]


def _half_bounds(a: _Points, rows: slice, b: _Points, columns: slice) -> np.ndarray:
    """Half of the squared distances of a block or a little less, never more; (n, m) float32."""
    if a.screen.dtype == torch.float32:
        bounds = a.screen[rows].numpy() @ b.screen[columns].numpy().T  # (n, m), twice as fast as torch's on two threads
    else:
        bounds = (a.screen[rows] @ b.screen[columns].T).float().numpy()  # (n, m)
    np.subtract(b.halves[columns], bounds, out=bounds)
    bounds += a.halves[rows, None]
    return bounds


def _candidates(bounds: np.ndarray, limits: np.ndarray, axis: int) -> np.ndarray:
    """(2, P): row and column of all pairs whose squared distance may be <= the limit of its row (axis 0) or column (1)."""
    near = bounds <= np.expand_dims(limits / 2, 1 - axis)
    return np.stack(np.divmod(np.flatnonzero(near), near.shape[1]))


def _squared_distances(a: _Points, rows: slice, b: _Points, columns: slice, pairs: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2 of a block's pairs, (2, P) -> (P,): float32 of sums in float64, copies of a point at exactly 0."""
    norms = a.norms[rows][pairs[0]] + b.norms[columns][pairs[1]]  # (P,)
    width = a.points.shape[1]
    if len(norms) > DENSE_SHARE * (rows.stop - rows.start) * (columns.stop - columns.start):
        distances = norms - 2 * (a.exact(rows) @ b.exact(columns).T)[*pairs]
    else:
        distances = np.empty(len(norms))
        for run in blocks(len(norms), max(CHUNK_VALUES // width, 1)):
            difference = a.exact(rows.start + pairs[0, run])  # (p, D)
            difference -= b.exact(columns.start + pairs[1, run])
            distances[run] = np.vecdot(difference, difference)
    # Four copies of a point have radius 0, and what rounding leaves of their distances would decide who is inside. The
    # bound is the product's worst rounding, closer than float32 features usually tell apart.
    distances[distances <= norms * (width * np.finfo(np.float64).eps)] = 0
    return distances.astype(np.float32)


def _largest(array: np.ndarray) -> float:
    """Largest absolute value, without a copy of the array (and without int's overflow of abs(min))."""
    return max(-float(array.min()), float(array.max()))
