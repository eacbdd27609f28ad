"""Encoded pictures of a source, read in the order of a listing, piece by piece, so that memory holds a few pieces only.

Not a decoder: that is images.py. Not a list of what there is: that is sources.py.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mdt_ray import storage, tables

READ_THREADS = 16
"""Pictures of a folder that are fetched at the same time: an object store answers each after tens of milliseconds."""
DENSE_BYTES = 2**20
"""Ranges of a tar are read together unless more than half, and more than this, lies between them."""
STREAM_BYTES = 8 * 2**20
"""Read at once from a Parquet column, whose row groups may be larger than memory. Decoded is a page at a time, of at most
1,024 rows where pyarrow wrote it."""
MAX_PICTURE_BYTES = 64 * 2**20
"""Of a picture in Parquet. What is larger counts as unreadable: a file of a thousandth of that may unpack to it."""
BYTES = (pa.binary(), pa.string())
"""Types of columns of pictures."""
MAX_SURVEYED_BYTES = 2**25
"""Of a column of pictures in a row group, fetched at once to look at its pages first."""
MOUNTED_SECONDS = (1.0, 5.0)
"""Waits before a failed read of a mounted file system is tried again."""
MAX_PIECE_BYTES = 2**28
"""After which a piece from Parquet ends, however few its images are."""


@dataclass(frozen=True)
class Piece:
    """Some images of a listing, still encoded."""

    ids: list[str]
    labels: list[int]
    data: pa.Array
    """Binary; null where the source has no bytes."""
    seconds: float
    """That reading took."""

    def singly(self) -> Iterator["Piece"]:
        """Pieces of one image each."""
        for i, (image_id, label) in enumerate(zip(self.ids, self.labels, strict=True)):
            yield Piece([image_id], [label], self.data[i:i + 1], 0.0)


def read_pieces(folder: str, kind: str, rows: pa.Table, piece_size: int) -> Iterator[Piece]:
    """The images of a listing's rows, `piece_size` at a time, or fewer where those of a Parquet file are large.

    Args:
        folder, kind: of the Source.
        rows: as listings.LISTING.
    Raises ValueError naming a file that cannot be read.
    """
    started = time.perf_counter()
    start = 0
    for data in _READERS[kind](folder, rows, piece_size):
        part = rows.slice(start, len(data))
        yield Piece(part["id"].to_pylist(), part["label"].to_pylist(), data, time.perf_counter() - started)
        start, started = start + len(data), time.perf_counter()


def _read_pictures(folder: str, rows: pa.Table, piece_size: int) -> Iterator[pa.Array]:
    fs, root = storage.resolve(folder)  # once: a client of an object store takes a while to make

    def read(name: str) -> bytes:
        with fs.open_input_stream(f"{root.rstrip('/')}/{name}") as stream:
            return stream.read()

    with ThreadPoolExecutor(READ_THREADS) as pool:
        names = rows["file"].to_pylist()
        for start in range(0, len(names), piece_size):
            part = names[start:start + piece_size]
            yield pa.array(pool.map(lambda n: _persist(fs, n, folder, lambda: read(n)), part), pa.large_binary())


def _read_tars(folder: str, rows: pa.Table, piece_size: int) -> Iterator[pa.Array]:
    for start in range(0, rows.num_rows, piece_size):
        part = rows.slice(start, piece_size)
        files, offsets, sizes = part["file"].to_pylist(), part["offset"].to_numpy(), part["size"].to_numpy()
        pictures: list[bytes] = []
        for name, run in itertools.groupby(range(part.num_rows), key=files.__getitem__):  # a piece may span tars
            run = list(run)
            pictures += _read_ranges(folder, name, offsets[run], offsets[run] + sizes[run])
        yield pa.array(pictures, pa.large_binary())


def _read_ranges(folder: str, name: str, starts: np.ndarray, stops: np.ndarray) -> list[bytes]:
    """Ranges of bytes of one file: neighbours in one read, others one by one."""
    fs, path = storage.resolve_below(folder, name)

    def read(start: int, stop: int) -> bytes:
        with fs.open_input_file(path) as handle:
            return handle.read_at(stop - start, start)

    def persist(start: int, stop: int) -> bytes:
        return _persist(fs, name, folder, lambda: read(start, stop))

    first, last = int(starts.min()), int(stops.max())
    if last - first <= 2 * (stops - starts).sum() + DENSE_BYTES:
        span = persist(first, last)
        return [span[start - first:stop - first] for start, stop in zip(starts, stops, strict=True)]
    return [persist(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]


def _read_parquet(folder: str, rows: pa.Table, piece_size: int) -> Iterator[pa.Array]:
    """Rows in file order, read one by one, however large their row groups are."""
    waiting: list[bytes | None] = []
    num_bytes = 0
    for picture in _parquet_pictures(folder, rows):
        waiting.append(picture)
        num_bytes += len(picture or b"")
        if len(waiting) == piece_size or num_bytes >= MAX_PIECE_BYTES:
            yield pa.array(waiting, pa.large_binary())
            waiting, num_bytes = [], 0
    if waiting:
        yield pa.array(waiting, pa.large_binary())


def _parquet_pictures(folder: str, rows: pa.Table) -> Iterator[bytes | None]:
    """Image bytes of the listed rows."""
    files, numbers = rows["file"].to_numpy(zero_copy_only=False), rows["offset"].to_numpy()
    for run in np.split(np.arange(len(files)), np.flatnonzero((files[1:] != files[:-1]) | (np.diff(numbers) != 1)) + 1):
        if not len(run):
            continue
        first, stop = int(numbers[run[0]]), int(numbers[run[-1]]) + 1
        fs, path = storage.resolve_below(folder, files[run[0]])
        waits = list(storage.waits(fs))
        while True:  # again from where it broke off
            try:
                with fs.open_input_file(path) as handle:
                    file = tables.open_handle(handle, buffer_size=STREAM_BYTES, pre_buffer=False)
                    for picture in _row_range(file, handle, first, stop):
                        first += 1
                        yield picture
                if first < stop:
                    raise ValueError("it ends before them")
                break
            except (OSError, ValueError, pa.ArrowException) as error:
                if not isinstance(error, OSError) or isinstance(error, FileNotFoundError) or not waits:
                    raise ValueError(f"{storage.join(folder, files[run[0]])}: rows {first}..{stop} are not readable "
                                     f"({error}); copy the file again") from error
                time.sleep(waits.pop(0))


def picture_column(schema: pa.Schema) -> str:
    """Path of the column of pictures: `image`, or the bytes in it. Raises ValueError where these are none."""
    if "image" not in schema.names:
        raise ValueError("has no column image")
    kind = schema.field("image").type
    path = "image.bytes" if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else "image"
    kind = kind.field("bytes").type if path != "image" else kind
    if kind not in BYTES:
        raise ValueError(f"column {path} is of type {kind!s:.200}; it must be of bytes")
    return path


def _row_range(file: pq.ParquetFile, handle: pa.NativeFile, first: int, stop: int) -> Iterator[bytes | None]:
    ends = np.cumsum([file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)])
    start = int(ends.searchsorted(first, side="right"))
    groups = range(start, min(int(ends.searchsorted(stop)) + 1, len(ends)))
    column, row = picture_column(file.schema_arrow), int(ends[start - 1]) if start else 0
    # One at a time: a thousand rows may repeat one picture for next to no bytes, and would be unpacked together.
    for batch in itertools.chain.from_iterable(_group_rows(file, handle, k, column) for k in groups):
        if row >= first:
            images = batch.column(0)
            images = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
            data = images.cast(pa.large_binary())[0].as_buffer()
            if data is not None:
                data = data.to_pybytes() if data.size <= MAX_PICTURE_BYTES else b""
            yield data
        row += 1
        if row == stop:
            return


def _group_rows(file: pq.ParquetFile, handle: pa.NativeFile, k: int, column: str) -> Iterator[pa.RecordBatch]:
    """Rows of a group. One of more bytes than are worth a look at all its pages comes in parts: what that could unpack to is
    no large multiple of it."""
    if not file.metadata.row_group(k).num_rows:
        return iter(())
    try:
        return tables.fetch_group(file.metadata, handle, k, [column], most=MAX_SURVEYED_BYTES).batches(1)
    except tables.TooLarge:
        return file.iter_batches(1, row_groups=[k], columns=[column])


_READERS = {"pictures": _read_pictures, "parquet": _read_parquet, "tar": _read_tars}


def _persist(fs: pafs.FileSystem, name: str, folder: str, read: Callable[[], bytes]) -> bytes:
    """`read()`, with patience. Raises ValueError naming the file."""
    waits = list(storage.waits(fs) or MOUNTED_SECONDS)
    while True:
        try:
            return read()
        except OSError as error:
            if storage.is_refusal(error) or isinstance(error, FileNotFoundError) or not waits:
                remedy = "it was there when the source was listed: put it back, or use a new output folder" \
                    if isinstance(error, FileNotFoundError) else "mend the access and run the same command again"
                raise ValueError(f"{storage.join(folder, name)}: cannot be read ({error}); {remedy}") from error
        time.sleep(waits.pop(0))
