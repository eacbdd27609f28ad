"""The tasks of `precompute` before its encoders: one reads a chunk's pictures piece by piece, others decode a piece.

They run on any node and import neither torch nor diffusers, so that a fresh process is at work within a second or two.
"""

from collections.abc import Iterator

import ray

from mdt_ray import storage
from mdt_ray.data import images, listings, readers

PIECES_READ_AHEAD = 4


@ray.remote(num_cpus=0, num_returns="streaming", _generator_backpressure_num_objects=PIECES_READ_AHEAD)
def read_chunk(output: str, chunk: int, folder: str, kind: str, piece_size: int) -> Iterator[readers.Piece]:
    """The encoded images of a chunk of the plan, only a few pieces ahead of who takes them."""
    rows, _, _ = listings.read_parts(storage.join(output, listings.PLAN), [chunk])
    yield from readers.read_pieces(folder, kind, rows, piece_size)


@ray.remote(num_cpus=1)
def decode_piece(piece: readers.Piece, image_size: int, exif_rotation: bool) -> images.Pixels:
    return images.decode_piece(piece, image_size, exif_rotation)
