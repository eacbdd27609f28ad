"""The arrays of an .npz, a zip of .npy members, from any storage: headers alone, or small arrays whole, and never a pickle.

np.load reads local files only, and a member whole. Which arrays a file must have is said by those who read it: arrays.py for
pictures, evaluation/reference.py for statistics.
"""

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from mdt_ray import storage

BLOCK_BYTES = 8 * 2**20
"""Read at once: what decompressing holds besides the result."""
MAX_HEADER_BYTES = 10_000
"""Of an array. numpy parses no longer ones, but reads them first."""
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What numpy writes. Of the others zipfile unpacks all that it has read, however little was asked for."""
_HEADERS = {(1, 0): ("<H", np.lib.format.read_array_header_1_0), (2, 0): ("<I", np.lib.format.read_array_header_2_0)}
"""Of .npy files by version: the form of their length, and what parses length and header."""
_LOCAL_HEADER = "<26xHH"  # of a zip member: the lengths of its name and extra field, which the directory may give otherwise
# What zipfile raises for hostile bytes; RuntimeError where they are encrypted or compressed in a way that it does not know.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, RuntimeError)


@dataclass(frozen=True)
class Archive:
    """An open .npz."""

    uri: str
    file: pa.NativeFile
    zip: zipfile.ZipFile

    @property
    def keys(self) -> list[str]:
        return [name.removesuffix(".npy") for name in self.zip.namelist() if name.endswith(".npy")]

    def info(self, key: str) -> zipfile.ZipInfo:
        if key not in self.keys:
            raise ValueError(f"{self.uri}: has no array {key!r}, but {self.keys}; save it with np.savez under that name")
        return self.zip.getinfo(f"{key}.npy")

    def open(self, key: str) -> Any:
        """The member, decompressed: header, then data."""
        info = self.info(key)
        if info.compress_type not in _COMPRESSIONS:
            raise ValueError(f"{self.uri}: {key} is compressed in a way that numpy does not write; save it with np.savez or "
                             "np.savez_compressed")
        return self.zip.open(info)


@dataclass(frozen=True)
class Header:
    """What an array's header says, and how long it is."""

    shape: tuple[int, ...]
    dtype: np.dtype
    num_bytes: int


@contextmanager
def open_file(uri: str) -> Iterator[pa.NativeFile]:
    """A file to seek in. Raises ValueError where it is not there or cannot be read, also later."""
    try:
        fs, path = storage.resolve(uri)
        with storage.patiently(fs, lambda: fs.open_input_file(path)) as file:
            yield file
    except FileNotFoundError as error:
        raise ValueError(f"{uri}: no such file; check the path") from error
    except OSError as error:
        raise ValueError(f"{uri}: cannot be read ({error}); mend the access and run the same command again") from error


@contextmanager
def open_archive(uri: str) -> Iterator[Archive]:
    """The file at a URI as an .npz. Raises ValueError where it is none, also for damage met while it is open."""
    with open_file(uri) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (*_DAMAGE, ValueError, OverflowError) as error:
            raise ValueError(f"{uri}: no .npz, or one that was cut short ({error}); write it with np.savez, or copy it "
                             "again") from error
        with archive:
            try:
                yield Archive(uri, file, archive)
            except _DAMAGE as error:
                raise ValueError(f"{uri}: damaged, or not written by numpy ({error}); copy it again") from error


def read_header(archive: Archive, key: str) -> Header:
    """Shape and dtype of an array, without reading its data.

    Raises ValueError for a key that is not there, less or more data than the header says, and for what is never read:
    objects (pickles) and Fortran order.
    """
    uri = archive.uri
    with archive.open(key) as stream:
        shape, fortran, dtype = _parse_header(stream, uri, key)
        header = Header(shape, dtype, stream.tell())
    if dtype.hasobject:
        raise ValueError(f"{uri}: {key} holds Python objects, but they are pickles, which can run code; save plain numbers")
    if fortran:
        raise ValueError(f"{uri}: {key} is in Fortran order, but must be in C order; save np.ascontiguousarray({key})")
    expected, found = math.prod(shape) * dtype.itemsize, archive.info(key).file_size - header.num_bytes
    if found != expected or min(shape, default=0) < 0:
        raise ValueError(f"{uri}: {key} has {found} bytes of data, but by its header, {dtype} {shape}, it must have "
                         f"{expected}; it was cut short: copy or write it again")
    return header


def _parse_header(stream: BinaryIO, uri: str, key: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"version {version}")  # 3.0 is for names of fields, which no array here has
        length_format, parse = _HEADERS[version]
        length = stream.read(struct.calcsize(length_format))
        num_bytes, = struct.unpack(length_format, length)
        if num_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"of {num_bytes} bytes")
        return parse(io.BytesIO(length + stream.read(num_bytes)))
    except (ValueError, struct.error, tokenize.TokenError, MemoryError) as error:  # what hostile headers make numpy raise
        raise ValueError(f"{uri}: {key} has no readable .npy header ({error}); save it with np.savez") from error


def read_array(archive: Archive, key: str) -> np.ndarray:
    """A whole array: look at its header first for one that fits in memory. Raises ValueError as `read_header`."""
    header = read_header(archive, key)
    array = np.empty(header.shape, header.dtype)
    with archive.open(key) as stream:
        skip(stream, header.num_bytes)
        fill(stream, array.reshape(-1).view(np.uint8), archive.uri, key)
    return array


def fill(stream: Any, flat: np.ndarray, uri: str, key: str) -> None:
    """Read until `flat`, (n,) uint8, is full. Raises ValueError where the stream ends before."""
    at = 0
    while at < len(flat):
        count = stream.readinto(flat[at:at + BLOCK_BYTES])
        if not count:
            raise ValueError(f"{uri}: {key} ends {len(flat) - at} bytes early; it was cut short: copy or write it again")
        at += count


def skip(stream: Any, num_bytes: int) -> None:
    """Read on without keeping anything; zipfile's own `seek` takes larger blocks and may end the checksum."""
    while num_bytes > 0 and (count := len(stream.read(min(num_bytes, BLOCK_BYTES)))):
        num_bytes -= count


def position_of(archive: Archive, key: str) -> int | None:
    """Where a stored member begins in the file, its header first; None for a compressed one."""
    info = archive.info(key)
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    archive.file.seek(info.header_offset)
    start = info.header_offset + 30 + sum(struct.unpack(_LOCAL_HEADER, archive.file.read(30)))
    if start + info.file_size > archive.file.size():
        raise ValueError(f"{archive.uri}: {key} ends behind the file's end; it was cut short: copy or write it again")
    return start
