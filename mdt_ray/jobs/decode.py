"""The tasks of `precompute` before its encoders: one reads a chunk's pictures piece by piece, others decode a piece.

They run on any node and import neither torch nor diffusers, so that a fresh process is at work within a second or two.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import ray

from mdt_ray import storage
from mdt_ray.data import images, readers, sources

PLAN = "plan.parquet"
PIECES_READ_AHEAD = 4


@dataclass(frozen=True)
class Pixels:
    """A decoded piece."""

    ids: list[str]
    labels: list[int]
    images: np.ndarray  # (n, H, W, 3) uint8
    rejected: list[dict[str, str]]
    """id and reason of those that are no readable image."""
    read_seconds: float
    decode_seconds: float

    @classmethod
    def of_rejected(cls, image_id: str, reason: str, image_size: int) -> "Pixels":
        empty = np.empty((0, image_size, image_size, 3), np.uint8)
        return cls([], [], empty, [{"id": image_id, "reason": reason}], 0.0, 0.0)

    @classmethod
    def joined(cls, parts: list["Pixels"]) -> "Pixels":
        return cls([i for p in parts for i in p.ids], [y for p in parts for y in p.labels],
                   np.concatenate([p.images for p in parts]), [r for p in parts for r in p.rejected],
                   sum(p.read_seconds for p in parts), sum(p.decode_seconds for p in parts))


@ray.remote(num_cpus=0, num_returns="streaming", _generator_backpressure_num_objects=PIECES_READ_AHEAD)
def read_chunk(output: str, chunk: int, folder: str, kind: str, piece_size: int) -> Iterator[readers.Piece]:
    """The encoded images of a chunk of the plan, only a few pieces ahead of who takes them."""
    rows, _, _ = sources.read_parts(storage.join(output, PLAN), [chunk])
    yield from readers.read_pieces(folder, kind, rows, piece_size)


@ray.remote(num_cpus=1)
def decode_piece(piece: readers.Piece, image_size: int, exif_rotation: bool) -> Pixels:
    return decode(piece, image_size, exif_rotation)


def decode(piece: readers.Piece, image_size: int, exif_rotation: bool) -> Pixels:
    """Decode and crop; an image that is not readable is listed, not fatal."""
    started = time.perf_counter()
    ids, labels, pixels, rejected = [], [], [], []
    for image_id, label, data in zip(piece.ids, piece.labels, piece.data, strict=True):
        try:
            pixels.append(images.center_crop(images.decode_image(data.as_py(), exif_rotation), image_size))
        except ValueError as error:
            rejected.append({"id": image_id, "reason": str(error)})
            continue
        ids.append(image_id)
        labels.append(label)
    array = np.stack(pixels) if pixels else np.empty((0, image_size, image_size, 3), np.uint8)
    return Pixels(ids, labels, array, rejected, piece.seconds, time.perf_counter() - started)
