"""Pictures in an .npz as ADM's tools write them, read by ranges: `arr_0`, uint8 (N, H, W, 3), maybe labels, `arr_1` (N,).

Never whole in memory, stored (np.savez) or compressed (np.savez_compressed). Not statistics of pictures, which may lie in
the same file: evaluation/reference.py reads those.
"""

import io
import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mdt_ray import storage
from mdt_ray.data import npz as npz_files
from mdt_ray.data.images import MAX_PIXELS

PICTURES, LABELS = "arr_0", "arr_1"
MAX_PICTURES = 10**7
"""In a file, whose labels are read whole: a kilobyte may say that it holds any number."""
MAX_PACKED_BYTES = 2**30
"""Of pictures that unpack to more than MAX_UNPACKED times their bytes in the file, as no photographs do: hundreds of them
are in memory together."""
MAX_UNPACKED = 100
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Zip's first moment, of all members written: equal arrays give equal bytes."""


@dataclass(frozen=True)
class NpzImages:
    """Where the pictures of a file are; small, and valid in any process."""

    uri: str
    num_images: int
    height: int
    width: int
    has_labels: bool
    start: int | None
    """First byte of arr_0 in the file; None where it is compressed, and reading a range costs reading all before it."""
    header_bytes: int
    """Of arr_0, before the first picture."""
    file_bytes: int

    @property
    def is_stored(self) -> bool:
        return self.start is not None


def open_npz(uri: str) -> NpzImages:
    """Find the pictures of an .npz, reading headers only.

    Raises ValueError for what is no .npz, lacks arr_0, or holds there anything but uint8 (N, H, W, 3) in C order, whole; for
    what unpacks to more than pictures do.
    """
    with npz_files.open_archive(uri) as archive:
        header = npz_files.read_header(archive, PICTURES)
        _check_pictures(uri, header.shape, header.dtype)
        info = archive.info(PICTURES)
        most = max(MAX_PACKED_BYTES, MAX_UNPACKED * min(info.compress_size, archive.file.size()))
        if info.file_size > most:
            raise ValueError(f"{uri}: {PICTURES} unpacks from {info.compress_size} to {info.file_size} bytes, and pictures "
                             f"to {MAX_UNPACKED} times their size at most; save it with np.savez if it is what you mean")
        count, height, width, _ = header.shape
        has_labels = LABELS in archive.keys
        if has_labels:
            _check_labels(uri, npz_files.read_header(archive, LABELS), count)
        return NpzImages(uri=uri, num_images=count, height=height, width=width, has_labels=has_labels,
                         start=npz_files.position_of(archive, PICTURES), header_bytes=header.num_bytes,
                         file_bytes=archive.file.size())


def _check_pictures(uri: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    remedy = ""
    if dtype.kind == "f":
        remedy = ("values in -1..1 become pictures by ((x + 1) * 127.5).clip(0, 255).astype(np.uint8), those in 0..1 by "
                  "(x * 255).round().astype(np.uint8)")
    elif dtype != np.uint8:
        remedy = "save levels of 0..255 with .astype(np.uint8)"
    elif len(shape) == 4 and shape[1] == 3 != shape[3]:
        remedy = "colours go last: save .transpose(0, 2, 3, 1)"
    elif (len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or shape[0] > MAX_PICTURES
          or shape[1] * shape[2] > MAX_PIXELS):
        remedy = f"save RGB pictures of one size, one to {MAX_PICTURES}, of at most {MAX_PIXELS} pixels"
    if remedy:
        raise ValueError(f"{uri}: {PICTURES} is {dtype} {shape}, but pictures are uint8 (N, H, W, 3); {remedy}")


def _check_labels(uri: str, header: npz_files.Header, count: int) -> None:
    if header.shape != (count,) or header.dtype.kind not in "iu":
        raise ValueError(f"{uri}: {LABELS} is {header.dtype} {header.shape}, but labels are whole numbers of shape "
                         f"({count},), one for each picture; save them so, or leave them out")


def read_images(npz: NpzImages, start: int, stop: int) -> np.ndarray:
    """Pictures start..stop as (stop - start, H, W, 3) uint8. Memory: the result and, where compressed, some blocks.

    Raises ValueError for a range outside 0..num_images, a file that changed since it was opened, damaged data. (A zip's
    checksum is of the whole array: in a stored one, only `stream_images` notices changed bytes.)
    """
    if not 0 <= start <= stop <= npz.num_images:
        raise ValueError(f"range {start}..{stop}: must lie in 0..{npz.num_images}, the pictures of {npz.uri}; ask for less")
    images = np.empty((stop - start, npz.height, npz.width, 3), np.uint8)
    skipped = npz.header_bytes + start * npz.height * npz.width * 3
    if npz.start is not None:
        with npz_files.open_file(npz.uri) as file:
            _check_unchanged(npz, file)
            file.seek(npz.start + skipped)
            npz_files.fill(file, images.reshape(-1), npz.uri, PICTURES)
    else:
        with npz_files.open_archive(npz.uri) as archive, archive.open(PICTURES) as stream:
            _check_unchanged(npz, archive.file)
            npz_files.skip(stream, skipped)
            npz_files.fill(stream, images.reshape(-1), npz.uri, PICTURES)
    return images


def stream_images(npz: NpzImages, batch_size: int) -> Iterator[np.ndarray]:
    """All pictures in order, `batch_size` at a time (fewer at the end): (n, H, W, 3) uint8.

    One pass, compressed or not, and the zip's checksum is compared at its end. Raises ValueError as `read_images`.
    """
    with npz_files.open_archive(npz.uri) as archive, archive.open(PICTURES) as stream:
        _check_unchanged(npz, archive.file)
        npz_files.skip(stream, npz.header_bytes)
        for start in range(0, npz.num_images, batch_size):
            images = np.empty((min(batch_size, npz.num_images - start), npz.height, npz.width, 3), np.uint8)
            npz_files.fill(stream, images.reshape(-1), npz.uri, PICTURES)
            yield images


def _check_unchanged(npz: NpzImages, file: pa.NativeFile) -> None:
    if file.size() != npz.file_bytes:
        raise ValueError(f"{npz.uri}: has {file.size()} bytes, but had {npz.file_bytes} when it was opened; leave files in "
                         "use alone, and start again")


def read_labels(npz: NpzImages) -> np.ndarray:
    """Labels of all pictures, (N,) int64; -1 where the file has none."""
    if not npz.has_labels:
        return np.full(npz.num_images, -1, np.int64)
    with npz_files.open_archive(npz.uri) as archive:
        _check_labels(npz.uri, npz_files.read_header(archive, LABELS), npz.num_images)
        return npz_files.read_array(archive, LABELS).astype(np.int64)


def fingerprint(uri: str, without: frozenset[str] = frozenset()) -> str:
    """64 hex digits for what an .npz holds: names, sizes and checksums of its arrays, from the zip's directory.

    Args:
        without: keys of arrays that make no difference.

    Reads some hundred bytes, whatever the file's size. That suffices to notice another file at the same place, which is what
    it is for: by chance, changed data keeps an array's CRC-32 once in 4 * 10^9. It is no proof against forgery, and damage
    that leaves the directory alone is for the readers to notice. Compression, order and times make no difference.
    """
    with npz_files.open_archive(uri) as archive:
        members = sorted((info.filename, info.file_size, info.CRC) for info in archive.zip.infolist()
                         if info.filename.removesuffix(".npy") not in without)
    return storage.sha256(json.dumps(members).encode())


def write_npz(uri: str, arrays: Mapping[str, np.ndarray], *, pictures: Iterable[np.ndarray] = (),
              shape: tuple[int, int, int, int] | None = None) -> None:
    """Write an .npz, whole or not at all: stored, readable by np.load(allow_pickle=False), equal arrays as equal bytes.

    Args:
        arrays: small ones, by key.
        pictures: parts of arr_0, each (n, H, W, 3) uint8, written as they come.
        shape: of arr_0, (N, H, W, 3); None: it is not written here.
    Raises ValueError where the parts are not of that shape or dtype, or do not add up to N; for arrays of objects.
    """
    with storage.create_file(uri) as path, zipfile.ZipFile(path, "w") as archive:
        if shape is not None:
            shape = tuple(map(int, shape))
            _check_pictures(uri, shape, np.dtype(np.uint8))
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
            with _create_member(archive, PICTURES, header.tell() + math.prod(shape)) as stream:
                stream.write(header.getvalue())
                for part in _checked_parts(uri, pictures, shape):
                    stream.write(np.ascontiguousarray(part).data)
        for key, array in arrays.items():
            array = np.asarray(array, order="C")
            with _create_member(archive, key, array.nbytes + 1024) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def _create_member(archive: zipfile.ZipFile, key: str, size: int) -> Any:
    """A new member, of about `size` bytes: zip must know beforehand whether it needs the 64-bit form."""
    info = zipfile.ZipInfo(f"{key}.npy", EPOCH)
    info.create_system = 3  # Unix, wherever it is written
    info.file_size = size
    return archive.open(info, "w")


def _checked_parts(uri: str, parts: Iterable[np.ndarray], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    count = 0
    for part in parts:
        if part.dtype != np.uint8 or part.shape[1:] != shape[1:]:
            raise ValueError(f"{uri}: a part from picture {count} on is {part.dtype} {part.shape}, but must be uint8 (n, "
                             f"{', '.join(map(str, shape[1:]))}); convert it")
        count += len(part)
        if count > shape[0]:
            break
        yield part
    if count != shape[0]:
        raise ValueError(f"{uri}: {count}{' or more' if count > shape[0] else ''} pictures came, but {shape[0]} were "
                         "announced; announce as many as there are")
