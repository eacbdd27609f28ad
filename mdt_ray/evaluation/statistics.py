"""Mean and covariance of features as sums that workers fill apart and one process adds up.

Not a metric: `metrics.frechet_distance` takes what comes out. Float64 throughout, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.linalg import blas

_KEYS = ("count", "sum", "outer", "centre")
_ROWS = 2048
"""Features in float64 at a time, however many come at once."""


def finite_matrix(field: str, value) -> np.ndarray:
    """`value` as a 2-D real array of finite numbers, dtype and memory kept where possible; (N, D), D >= 1.

    Raises ValueError naming `field`, what was found and the rule.
    """
    array = np.asarray(value)
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind not in "fiu":
        raise ValueError(
            f"{field}: got shape {array.shape} and dtype {array.dtype}, but it must be a real array of shape (N, D) "
            "with D >= 1; pass one row per image"
        )
    bad = ~np.isfinite(array)
    if bad.any():
        raise ValueError(
            f"{field}: {int(bad.sum())} of {array.size} values are not finite, in {int(bad.any(axis=1).sum())} of "
            f"{len(array)} rows (first: row {int(bad.any(axis=1).argmax())}), but all must be; look for NaN in those "
            "images or half-precision overflow in the extractor"
        )
    return array


class FeatureStatistics:
    """Count, sum and sum of outer products of (features - centre): all that mean and covariance need.

    Sums add, so any split of the features over workers agrees to rounding (1e-9 relative), and the same chunks, each
    with its own statistics, merged in index order give the same bits. Covariance is a difference of two sums: where
    |mean - centre| is far above the standard deviation it loses digits (about eps * ratio^2), so give a rough
    mean as `centre` then, the same one on every worker.

    Attributes: count (int), sum (D,), outer (D, D), centre (D,); arrays are float64.
    """

    def __init__(self, num_features: int, centre=None):
        """No features yet, of width `num_features`; `centre` is (num_features,), by default zeros.

        Raises ValueError on a width below 1 or a centre of another shape or not finite.
        """
        if num_features < 1:
            raise ValueError(f"num_features: got {num_features}, but it must be >= 1; pass the extractor's width")
        centre = np.zeros(num_features) if centre is None else np.array(centre, dtype=np.float64)
        if centre.shape != (num_features,) or not np.isfinite(centre).all():
            raise ValueError(
                f"centre: got shape {centre.shape}, {int((~np.isfinite(centre)).sum())} values not finite, but it must "
                f"be finite and of shape ({num_features},); pass a rough mean of the features, or leave it out"
            )
        self.count = 0
        self.sum = np.zeros(num_features)  # (D,)
        self._lower = np.zeros((num_features, num_features), order="F")  # (D, D), of `outer`, with zeros above it
        self.centre = centre  # (D,)

    @property
    def outer(self) -> np.ndarray:
        """Sum of outer products, (D, D), symmetric; a copy."""
        return self._lower + np.tril(self._lower, -1).T

    @property
    def num_features(self) -> int:
        """Width D of a feature vector."""
        return len(self.centre)

    def update(self, features) -> FeatureStatistics:
        """Add a batch of features, (B, D) of any real dtype; B may be 0. Returns self.

        Raises ValueError (and adds nothing) on another width or values that are not finite.
        """
        features = finite_matrix("features", features)
        if features.shape[1] != self.num_features:
            raise ValueError(
                f"features: got width {features.shape[1]}, but these statistics have {self.num_features}; "
                "use one extractor for all features of a metric"
            )
        for start in range(0, len(features), _ROWS):
            shifted = features[start:start + _ROWS].astype(np.float64)  # (b, D)
            shifted -= self.centre
            self.sum += shifted.sum(axis=0)
            # One triangle, in place: half the time of the matrix product and its sum.
            self._lower = blas.dsyrk(1.0, shifted.T, beta=1.0, c=self._lower, lower=True, overwrite_c=True)
        self.count += len(features)
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Add another worker's sums to these. Merge in index order for the same bits. Returns self.

        Raises ValueError when the centres (or widths) differ: such sums do not add.
        """
        if not np.array_equal(self.centre, other.centre):
            raise ValueError(
                f"centre: got {_brief(other.centre)} to merge into {_brief(self.centre)}, but centres must be equal; "
                "fix one centre before the work is handed out"
            )
        self.count += other.count
        self.sum += other.sum
        self._lower += other._lower
        return self

    @property
    def mean(self) -> np.ndarray:
        """(D,). ValueError without features."""
        if self.count < 1:
            raise ValueError("count: got 0 features, but a mean needs at least 1; update() or merge() first")
        return self.centre + self.sum / self.count

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), unbiased (divided by count - 1, as np.cov and ADM's evaluator). ValueError below two features."""
        if self.count < 2:
            raise ValueError(f"count: got {self.count} features, but a covariance needs at least 2; evaluate more")
        return (self.outer - np.outer(self.sum, self.sum) / self.count) / (self.count - 1)

    def to_dict(self) -> dict[str, np.ndarray]:
        """Plain arrays, for `np.savez(path, **statistics.to_dict())`; copies, so later updates leave them alone."""
        return {
            "count": np.array(self.count, dtype=np.int64),
            "sum": self.sum.copy(),
            "outer": self.outer,
            "centre": self.centre.copy(),
        }

    @classmethod
    def from_dict(cls, arrays: Mapping[str, np.ndarray]) -> FeatureStatistics:
        """Inverse of `to_dict`, bit for bit; takes an open npz too. ValueError on missing keys, wrong shapes or NaN."""
        if set(arrays) != set(_KEYS):
            raise ValueError(f"arrays: got keys {sorted(arrays)}, but they must be {sorted(_KEYS)}; pass to_dict()'s")
        read = {key: np.array(arrays[key]) for key in _KEYS}
        width = read["centre"].size
        rules = {"count": (), "sum": (width,), "outer": (width, width), "centre": (width,)}
        for key, shape in rules.items():
            if read[key].shape != shape or not np.isfinite(read[key]).all():
                raise ValueError(
                    f"{key}: got shape {read[key].shape}, but it must be finite and of shape {shape}; "
                    "the file is damaged: delete it and run its chunk again"
                )
        if read["count"] < 0:
            raise ValueError(f"count: got {read['count']}, but it must be >= 0; delete the file, run its chunk again")
        statistics = cls(width, read["centre"])
        statistics.count = int(read["count"])
        statistics.sum = read["sum"].astype(np.float64)
        statistics._lower = np.asfortranarray(np.tril(read["outer"].astype(np.float64)))
        return statistics


def _brief(vector: np.ndarray) -> str:
    """The first few numbers of a vector, with its width: enough to tell two centres apart in a message."""
    return f"{np.array2string(vector[:3], precision=6)} (width {len(vector)})"
