"""Did the model copy its training images? The nearest training latents of samples, and how near unseen images lie to them.

Not a picture of them: that is report/memorisation.py. All latents here are scaled, as the sampler draws them and
`Vae.decode` takes them: the folder's raw ones become (raw - shift) * scale. Distances are Euclidean, in those units.

Q queries, n nearest, C latent channels, h x w latent size, D = C h w, B rows of a block.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mdt_ray.data import latents
from mdt_ray.data.latent_reader import LatentReader
from mdt_ray.data.latents import Manifest

MAX_HELD_OUT = 1000
"""Held-out images that are compared: enough to tell their nearest 1%."""
NEAR_SHARE = 0.01
"""A sample is called memorised where it is as near to a training image as this share of unseen images."""
BLOCK_VALUES = 2**21
"""Values of an array of the search, at most 16 MiB: it holds a few such arrays, however many latents there are."""
LARGEST = 1e30
"""Values of queries stay below it, so that their products with latents do not overflow float32."""


@dataclass(frozen=True)
class Neighbours:
    """The n nearest images of each query, nearest first."""

    distances: np.ndarray  # (Q, n) float64
    ids: np.ndarray  # (Q, n) str
    labels: np.ndarray  # (Q, n) int64
    mirrored: np.ndarray  # (Q, n) bool, whether the mirror image is the nearer one
    latents: np.ndarray  # (Q, n, C, h, w) float32, scaled; of the mirror image where that is nearer


@dataclass(frozen=True)
class Memorisation:
    """Samples beside images that the model never saw: how near each lies to the training images.

    The rule compares three sets, as the data-copying test of Meehan et al. 2020 (arXiv 2004.05675) does: of M held-out
    images take the k-th nearest to the training set, k = 1% of M + 1 rounded, at least 1. Its distance is the threshold,
    and an unseen image is as near with probability k / (M + 1). Many more samples than that are too near to be new.

    Or they are too simple: a plain picture is near to many others. The picture of the nearest tells one from the other.
    """

    neighbours: Neighbours
    held_out: np.ndarray  # (M,) float64, distance of each held-out image to its nearest training image

    @property
    def nearest(self) -> np.ndarray:
        """Distance of each sample to its nearest training image, (Q,)."""
        return self.neighbours.distances[:, 0]

    @property
    def threshold(self) -> float | None:
        """Distance of the nearest 1% of held-out images; None without any."""
        return float(np.sort(self.held_out)[self._rank - 1]) if len(self.held_out) else None

    @property
    def _rank(self) -> int:
        return max(1, round(NEAR_SHARE * (len(self.held_out) + 1)))

    def numbers(self) -> dict[str, Any]:
        """What metrics.json can hold; the shares and the held-out distances are None without held-out images."""
        threshold = self.threshold
        known = threshold is not None
        return {
            "num_samples": len(self.nearest), "num_held_out": len(self.held_out),
            "least_distance": float(self.nearest.min()), "median_distance": float(np.median(self.nearest)),
            "held_out_median_distance": float(np.median(self.held_out)) if known else None,
            "threshold": threshold,
            "memorised_share": float((self.nearest <= threshold).mean()) if known else None,
            "expected_share": self._rank / (len(self.held_out) + 1) if known else None,
        }


def memorisation(samples: np.ndarray, folder: str, manifest: Manifest, num_nearest: int = 3) -> Memorisation:
    """Compare samples (Q, C, h, w), scaled, with the training images of a folder of latents, in one pass over it.

    Raises ValueError as `nearest`.
    """
    _check_queries(samples, manifest)
    unseen = held_out(folder, manifest)
    found = nearest(np.concatenate([samples, unseen]), folder, manifest, num_nearest)
    count = len(samples)
    return Memorisation(Neighbours(**{name: values[:count] for name, values in vars(found).items()}),
                        found.distances[count:, 0])


def held_out(folder: str, manifest: Manifest) -> np.ndarray:
    """Latents of up to MAX_HELD_OUT held-out images, always the same ones, (M, C, h, w) float32, scaled.

    They are drawn from their posteriors, as those that the model learns from are, so that they carry the noise that its
    samples carry too. (In a latent space with wide posteriors the noise can be longer than the way to the nearest image.)
    """
    reader = LatentReader(folder, manifest, max_groups=1, split="validation")
    generator = np.random.default_rng(0)
    count = min(MAX_HELD_OUT, reader.num_images)
    moments, _ = reader.read(np.sort(generator.choice(reader.num_images, count, replace=False)))  # (M, 2, C, h, w)
    mean, std = moments.astype(np.float32).swapaxes(0, 1)  # 2 x (M, C, h, w)
    return _scaled(mean + std * generator.standard_normal(mean.shape, np.float32), manifest)


def nearest(queries: np.ndarray, folder: str, manifest: Manifest, num_nearest: int = 3,
            split: Literal["train", "validation"] = "train") -> Neighbours:
    """Nearest posterior means of a split by exact search, read row group by row group.

    An image whose mirror image the folder holds too counts once, at the smaller of both distances. Among equally near
    images those that come first in the folder win; the result does not depend on how the rows are grouped.

    Args: queries (Q, C, h, w), scaled, finite and below LARGEST.
    Raises ValueError for queries of another shape or not finite, and for a split of fewer than `num_nearest` images.
    """
    _check_queries(queries, manifest)
    if num_nearest < 1:
        raise ValueError(f"num_nearest = {num_nearest}: must be at least 1")
    reader = LatentReader(folder, manifest, max_groups=1, split=split)
    if reader.num_images < num_nearest:
        raise ValueError(f"split = {split!r}: {folder} holds {reader.num_images} such images, but num_nearest = "
                         f"{num_nearest} are asked for; ask for fewer, or precompute with another validation_share")
    search = _Search(queries, num_nearest)
    for block in _blocks(reader, max(1, BLOCK_VALUES // max(len(queries), queries[0].size))):
        search.add(block)
    return search.result(queries.shape[1:])


@dataclass(frozen=True)
class _Block:
    ids: np.ndarray  # (B,)
    labels: np.ndarray  # (B,)
    views: np.ndarray  # (1 or 2, B, D) float32: of the images, and of their mirror images


@dataclass(frozen=True)
class _Found:
    square: float
    id: str
    label: int
    mirrored: bool
    latent: np.ndarray  # (D,) float32


class _Search:
    """The nearest images among all blocks so far.

    |a|^2 + |b|^2 - 2ab in float32 is fast, but its rounding leaves copies at a distance and depends on the block. So it
    only names the candidates, with room for its error; what is kept is the sum of squared differences, in float64.
    """

    def __init__(self, queries: np.ndarray, num_nearest: int):
        self.queries = queries.reshape(len(queries), -1).astype(np.float32)  # (Q, D)
        self.norms = np.square(self.queries, dtype=np.float64).sum(1)[:, None]  # (Q, 1)
        self.num_nearest = num_nearest
        self.found: list[list[_Found]] = [[] for _ in queries]
        self.worst = np.full(len(queries), np.inf)  # (Q,), square of the last that counts so far

    def add(self, block: _Block) -> None:
        numbers, rows = np.nonzero(self._candidates(block.views))  # by query, then in the folder's order
        step = max(1, BLOCK_VALUES // self.queries.shape[1])
        for first in range(0, len(rows), step):
            some, at = numbers[first:first + step], rows[first:first + step]
            differences = (np.subtract(self.queries[some], view[at], dtype=np.float64) for view in block.views)  # (pairs, D)
            squares = np.stack([np.square(difference).sum(1) for difference in differences])  # (1 or 2, pairs)
            views = squares.argmin(0)
            for number, row, view, square in zip(some, at, views, squares.min(0), strict=True):
                if square < self.worst[number]:  # (an equally near one came first)
                    self._insert(int(number), _Found(float(square), block.ids[row], int(block.labels[row]), bool(view),
                                                     block.views[view, row].copy()))

    def _candidates(self, views: np.ndarray) -> np.ndarray:
        """Which rows may be among the nearest, (Q, B) bool."""
        lower, upper = (np.full((len(self.queries), views.shape[1]), np.inf) for _ in range(2))  # (Q, B), of the squares
        for view in views:
            room = self.norms + np.square(view, dtype=np.float64).sum(1)  # (Q, B)
            squares = room - 2.0 * (self.queries @ view.T)
            # Twice the worst rounding of 2ab: |error| <= D eps |a||b| <= D eps (|a|^2 + |b|^2) / 2.
            room *= view.shape[1] * np.finfo(np.float32).eps
            np.minimum(lower, squares - room, out=lower)
            np.minimum(upper, squares + room, out=upper)
        limit = self.worst
        if upper.shape[1] > self.num_nearest:
            last = self.num_nearest - 1
            upper.partition(last, axis=1)
            limit = np.minimum(limit, upper[:, last])
        return lower <= limit[:, None]

    def _insert(self, number: int, found: _Found) -> None:
        best = self.found[number]
        insort(best, found, key=lambda f: f.square)  # behind those equally near
        del best[self.num_nearest:]
        if len(best) == self.num_nearest:
            self.worst[number] = best[-1].square

    def result(self, shape: tuple[int, ...]) -> Neighbours:
        def table(name: str) -> np.ndarray:
            return np.array([[getattr(f, name) for f in best] for best in self.found])

        return Neighbours(distances=np.sqrt(table("square")), ids=table("id"), labels=table("label"),
                          mirrored=table("mirrored"), latents=table("latent").reshape(len(self.found), -1, *shape))


def _blocks(reader: LatentReader, num_rows: int) -> Iterator[_Block]:
    """All rows of the split in the folder's order, at most `num_rows` at a time."""
    manifest = reader.manifest
    for group in reader.groups:
        arrays = latents.read_group(reader.folder, group.file, group.group, manifest.shape, manifest.flip, with_ids=True)
        names = ["moments"] + ["moments_flip"] * manifest.flip
        for first in range(0, len(group.rows), num_rows):
            rows = group.rows[first:first + num_rows]
            views = np.stack([_scaled(arrays[name][rows, 0].astype(np.float32), manifest) for name in names])
            yield _Block(ids=arrays["id"][rows], labels=arrays["label"][rows],
                         views=views.reshape(len(names), len(rows), -1))


def _scaled(raw: np.ndarray, manifest: Manifest) -> np.ndarray:
    """In float32, as training does it: the same image gives the same numbers."""
    return (raw - np.float32(manifest.vae["shift"])) * np.float32(manifest.vae["scale"])


def _check_queries(queries: np.ndarray, manifest: Manifest) -> None:
    if queries.ndim != 4 or list(queries.shape[1:]) != list(manifest.shape) or not len(queries):
        raise ValueError(f"queries: have shape {queries.shape}, but must be (Q, {', '.join(map(str, manifest.shape))}) with "
                         "Q > 0; take latents of the model that was trained on this folder")
    bad = ~(np.abs(queries) < LARGEST).all(axis=(1, 2, 3))  # (Q,), with those that are no numbers
    if bad.any():
        raise ValueError(f"queries: latent {bad.argmax()} is not finite or not below {LARGEST:g}, but all must be; the "
                         "model diverged, or overflowed in half precision")
