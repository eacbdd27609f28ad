"""Pictures that exist, to be measured by ranges of their index: those of a source, or of an .npz file. Not drawn ones."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mdt_ray import storage
from mdt_ray.data import arrays, images, listings, readers, sources
from mdt_ray.data import npz as npz_files
from mdt_ray.data.listings import Listing
from mdt_ray.data.sources import Source

logger = logging.getLogger(__name__)
LISTING = "listing.parquet"


@dataclass(frozen=True)
class PictureSet:
    """What there is to read, in index order."""

    uri: str
    num_images: int
    image_size: int | None
    """Side of the pictures where all have one, else of the first; None for a source that is cropped to any."""
    fingerprint: str
    """Of the content: names and sizes of a source's files, checksums of an npz."""
    source: Source | None = None
    listing: Listing | None = None

    def hand_out(self, folder: str, chunk_size: int) -> dict[str, Any]:
        """What `read_range` takes in another process; a source's listing is written below `folder`, cut by chunks."""
        if self.listing is None:
            return {"npz": self.uri}
        starts = range(0, self.num_images, chunk_size)
        parts = [np.arange(start, min(start + chunk_size, self.num_images)) for start in starts]
        uri = storage.join(folder, LISTING)
        listings.write_parts(uri, self.listing, parts)
        return {"listing": uri, "folder": self.source.folder, "kind": self.source.kind}


def open_pictures(uri: str) -> PictureSet:
    """A folder, Parquet or tar source, `digits`, or an .npz file with `arr_0`. Labels of a source are not looked at.

    A folder with subfolders comes in a fixed shuffled order: its own would be sorted by class, which no metric over
    consecutive images bears (Inception Score). An npz is in the order that it was written in, as for ADM's evaluator.
    Raises ValueError for what is none of these, and pictures that are not square.
    """
    if storage.base(uri).endswith(".npz"):
        npz = arrays.open_npz(uri)
        if npz.height != npz.width:
            raise ValueError(f"{uri}: has pictures of {npz.width} x {npz.height} pixels, but they must be square: cut them")
        if not npz.is_stored:
            logger.warning("%s is compressed, so every chunk is read from its start; saved by np.savez it would not be", uri)
        return PictureSet(uri=uri, num_images=npz.num_images, image_size=npz.height,
                          fingerprint=arrays.fingerprint(uri)[:16])
    source = sources.open_source(uri, need_labels=False)
    listing = listings.list_images(source)
    if len({name.rpartition("/")[0] for name in source.files["name"].to_pylist()}) > 1 and source.kind == "pictures":
        listing = replace(listing, table=listing.table.take(listings.shuffled(listing.table.num_rows)))
    return PictureSet(uri=uri, num_images=listing.table.num_rows, image_size=None, fingerprint=source.fingerprint,
                      source=source, listing=listing)


def side_of(pictures: PictureSet) -> int:
    """Side of the first picture, which all others must share where nothing is cropped.

    Raises ValueError if it is no picture, or not square.
    """
    if pictures.image_size is not None:
        return pictures.image_size
    piece = next(readers.read_pieces(pictures.source.folder, pictures.source.kind, pictures.listing.table.slice(0, 1), 1))
    try:
        first = images.decode_image(piece.data[0].as_py())
    except ValueError as error:
        raise ValueError(f"{pictures.uri}: {piece.ids[0]!r}: {error}; mend or remove it") from error
    if first.width != first.height:
        raise ValueError(f"{pictures.uri}: {piece.ids[0]!r} has {first.width} x {first.height} pixels, but pictures must be "
                         "square; cut them")
    return first.width


def check(uri: str) -> None:
    """Raise ValueError for what `open_pictures` would not open, without listing pictures."""
    if storage.base(uri).endswith(".npz"):
        with npz_files.open_archive(uri):
            pass
    else:
        sources.open_source(uri, need_labels=False)


def read_range(handed: dict[str, Any], start: int, stop: int, chunk_size: int, image_size: int,
               exact: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Pictures start..stop (a chunk) of what `hand_out` gave: (n, H, W, 3) uint8, labels (n,) int64 (-1 without), and how
    many are left out as unreadable.

    Args:
        image_size: side to crop a source's pictures to.
        exact: refuse pictures that are not readable or of another size, instead of leaving out and cropping them.
    Raises ValueError.
    """
    if "npz" in handed:
        npz = arrays.open_npz(handed["npz"])
        return arrays.read_images(npz, start, stop), arrays.read_labels(npz)[start:stop], 0
    rows, _, _ = listings.read_parts(handed["listing"], [start // chunk_size])
    pieces = readers.read_pieces(handed["folder"], handed["kind"], rows.slice(0, stop - start), stop - start)
    found = images.decode_pieces(pieces, image_size, exact=exact)
    if exact and found.rejected:
        first = found.rejected[0]
        raise ValueError(f"{storage.join(handed['folder'], first['id'])}: {first['reason']}; mend or remove it")
    return found.images, np.array(found.labels, dtype=np.int64), len(found.rejected)
