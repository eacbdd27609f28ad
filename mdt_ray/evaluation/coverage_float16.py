"""The coverage of coverage.py in the half-precision arithmetic of ADM's evaluator, for numbers equal to published ones.

Not for anything else: distances have 11 bits, so that ties abound, and depend on the blocks that ADM cuts the sets into.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from mdt_ray.evaluation.coverage import blocks

ADM_BLOCK = 10_000
"""Rows and columns of ADM's blocks: one value that is not finite has its whole block computed anew in float32."""


def coverage(ref: np.ndarray, samples: np.ndarray, k: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each sample is in a ball of `ref`, and each of `ref` in a ball of the samples: (M,) and (N,) bool.

    ref: (N, D), samples: (M, D). `block_size` rows at a time are multiplied, which has no influence on the result.
    """
    reach = _radii(ref, k, block_size), _radii(samples, k, block_size)  # (N,), (M,)
    inside = np.zeros(len(samples), dtype=bool), np.zeros(len(ref), dtype=bool)
    for rows, columns in itertools.product(blocks(len(ref), ADM_BLOCK), blocks(len(samples), ADM_BLOCK)):
        distances = _squared_distances(ref[rows], samples[columns], block_size)  # (n, m)
        inside[0][columns] |= (distances <= reach[0][rows, None]).any(axis=0)
        inside[1][rows] |= (distances <= reach[1][columns]).any(axis=1)
    return inside


def _radii(points: np.ndarray, k: int, block_size: int) -> np.ndarray:
    """The k-th smallest squared distance of every point to all, with the 0th its own, which rounding leaves at 0 or more."""
    radii = np.empty(len(points), dtype=np.float32)  # (N,)
    for rows in blocks(len(points), ADM_BLOCK):
        nearest = np.empty((rows.stop - rows.start, 0), dtype=np.float32)  # (n, up to k + 1)
        for columns in blocks(len(points), ADM_BLOCK):
            distances = _squared_distances(points[rows], points[columns], block_size)  # (n, m)
            count = min(k + 1, distances.shape[1])
            distances.partition(count - 1, axis=1)
            nearest = np.sort(np.concatenate([nearest, distances[:, :count]], axis=1), axis=1)[:, :k + 1]
        radii[rows] = nearest[:, k]
    return radii


def _squared_distances(a: np.ndarray, b: np.ndarray, block_size: int) -> np.ndarray:
    """Of one block of ADM's, (n, D) and (m, D) -> (n, m) float32: in float16, or in float32 if that is not finite."""
    distances = np.empty((len(a), len(b)), dtype=np.float32)
    for dtype in (torch.float16, torch.float32):
        columns = torch.from_numpy(b.astype(np.float32)).to(dtype)  # (m, D)
        for rows in blocks(len(a), block_size):
            part = _expansion(torch.from_numpy(a[rows].astype(np.float32)).to(dtype), columns)  # (r, m)
            distances[rows] = part.numpy()
        if np.isfinite(distances).all():
            break
    return distances


def _expansion(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """max(|a|^2 - 2 ab + |b|^2, 0) with every result rounded to the dtype of both; (n, D) and (m, D) -> (n, m).

    Sums are taken in float32 and rounded once, as TensorFlow's half-precision products are on GPUs unless told otherwise;
    that its sums of squares are too is assumed. Its order of adding up is not known.
    """
    norms = [x.square().sum(dim=1, dtype=torch.float32).to(x.dtype) for x in (a, b)]  # (n,), (m,)
    products = torch.from_numpy(a.float().numpy() @ b.float().numpy().T).to(a.dtype)  # (n, m)
    return ((norms[0][:, None] - 2 * products).add_(norms[1])).clamp_(min=0)
