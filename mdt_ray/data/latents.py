"""Latents on disk: one Parquet file per chunk, and the manifest that says they are whole. Plain pyarrow reads them.

A row is id, label, split, moments (posterior mean then std, float16, raw and unscaled) and optionally moments_flip.
"""

import functools
import hashlib
import io
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mdt_ray import config_io, parquet_pages, storage, tables

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"
FILE_NAME = re.compile(r"chunk-\d{5,}\.parquet")
ROW_OVERHEAD = 60
"""Bytes of a row beside its moments: id, label, split, and their share of the file's index."""
COLUMN_TYPES = (pa.int64(), pa.int32(), pa.string(), pa.binary())
RETRY_SECONDS = (1.0, 10.0, 60.0)
"""Waited before a read is tried again that failed for a reason outside the file."""
REBUILD = "run the same `mdt-ray precompute` again, which rebuilds just that file"


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """A chunk's file as the manifest lists it."""

    name: str
    num_rows: int
    num_bytes: int
    sha256: str
    rows_per_group: int
    validation_rows: list[int]
    """Rows held out from training."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json of a latents folder, written last."""

    identity: str
    """Name of the run that wrote them (settings and source)."""
    shape: list[int]
    """Of one latent, (C, h, w)."""
    image_size: int
    vae: dict
    """path, revision, scale, shift, weights_hash."""
    num_classes: int
    class_counts: list[int]
    class_names: list[str]
    flip: bool
    precision: str = "fp32"
    """In which the VAE encoded: fp32 or bf16."""
    num_rejected: int = 0
    """Images that could not be read; rejected.parquet lists them."""
    statistics: dict = field(default_factory=dict)
    """mean and std of each channel of raw latents drawn from the posteriors, over all images."""
    files: list[LatentFile] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @property
    def num_rows(self) -> int:
        return sum(f.num_rows for f in self.files)

    @property
    def num_train(self) -> int:
        return sum(f.num_rows - len(f.validation_rows) for f in self.files)

    @property
    def content(self) -> str:
        """Hash of every latent: what training's identity depends on."""
        return config_io.fingerprint([f.sha256 for f in self.files])


def file_name(chunk: int) -> str:
    """Of a chunk's file: what FILE_NAME knows."""
    return f"chunk-{chunk:05d}.parquet"


def split_of(image_id: str, validation_share: float) -> str:
    """`validation` for a fixed share of ids, by hash, else `train`."""
    place = int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "big") / 2**64
    return "validation" if place < validation_share else "train"


def encode_table(ids: list[str], labels: list[int], moments: np.ndarray, flipped: np.ndarray | None,
                 validation_share: float, metadata: dict) -> pa.Table:
    """Rows of one chunk as an Arrow table.

    Args: moments (n, 2, C, h, w), mean then std, of any float type; `flipped` the same for the mirror images.
    """
    def rows(values: np.ndarray) -> pa.Array:
        return pa.array([row.tobytes() for row in values.astype(np.float16)], pa.binary())

    columns = {"id": pa.array(ids, pa.string()), "label": pa.array(labels, pa.int32()),
               "split": pa.array([split_of(i, validation_share) for i in ids], pa.string()), "moments": rows(moments)}
    if flipped is not None:
        columns["moments_flip"] = rows(flipped)
    return pa.table(columns).replace_schema_metadata({"mdt_ray.latents": json.dumps(metadata, sort_keys=True)})


def write_file(folder: str, name: str, table: pa.Table, rows_per_group: int) -> LatentFile:
    """Write a chunk's file whole; returns its entry for the manifest. The same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows_per_group, compression="none", use_dictionary=False)
    data = buffer.getvalue()
    storage.write_bytes(storage.join(folder, name), data)
    validation_rows = [row for row, split in enumerate(table.column("split").to_pylist()) if split == "validation"]
    return LatentFile(name=name, num_rows=table.num_rows, num_bytes=len(data),
                      sha256=storage.sha256(data), rows_per_group=rows_per_group, validation_rows=validation_rows)


def row_bytes(shape: Sequence[int], flip: bool) -> int:
    """About how many bytes a latent of `shape` (C, h, w) takes on disk: mean and std in float16; twice that with `flip`."""
    return 2 * 2 * math.prod(shape) * (2 if flip else 1) + ROW_OVERHEAD


def sums(moments: np.ndarray) -> dict[str, Any]:
    """What `statistics` adds up, of moments (n, 2, C, h, w): per channel, in float64."""
    mean, std = moments.astype(np.float64).swapaxes(0, 1)  # 2 x (n, C, h, w)
    axes = (0, 2, 3)
    return {"count": mean.size // mean.shape[1], "sum": mean.sum(axes).tolist(),
            "sum_of_squares": (mean**2 + std**2).sum(axes).tolist()}


def statistics(parts: list[dict[str, Any]]) -> dict[str, list[float]]:
    """mean and std of each channel of raw latents drawn from the posteriors (their variance is that of the means plus the
    mean of the variances)."""
    count = sum(part["count"] for part in parts)
    mean, square = (np.sum([part[name] for part in parts], 0) / count for name in ("sum", "sum_of_squares"))
    return {"mean": mean.tolist(), "std": np.sqrt(square - mean**2).tolist()}


def write_rejected(folder: str, rejected: list[dict[str, str]]) -> None:
    """rejected.parquet: id and reason of every image that could not be read."""
    schema = pa.schema([("id", pa.string()), ("reason", pa.string())])
    tables.write(storage.join(folder, REJECTED), pa.Table.from_pylist(rejected, schema))


def write_manifest(folder: str, manifest: Manifest) -> None:
    storage.write_json(storage.join(folder, MANIFEST), asdict(manifest))


def read_rejected(folder: str) -> list[dict[str, str]]:
    """What `write_rejected` wrote; nothing, where it is missing."""
    try:
        return tables.read(storage.join(folder, REJECTED)).to_pylist()
    except FileNotFoundError:
        return []


def read_manifest(folder: str) -> Manifest:
    """Raises ValueError for a folder without a manifest, or with one that is damaged, of another schema, or names what is no
    file of the folder."""
    try:
        values = storage.read_json(storage.join(folder, MANIFEST))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no {MANIFEST}, so no finished latents; run `mdt-ray precompute` with this output"
                         ) from error
    except ValueError as error:
        raise _damaged_manifest(folder, error) from error
    if not isinstance(values, dict):
        raise _damaged_manifest(folder, f"a {type(values).__name__}")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{folder}: schema_version = {values.get('schema_version')!r}, must be {SCHEMA_VERSION}; "
                         "write the latents again with `mdt-ray precompute`")
    try:
        manifest = Manifest(**values | {"files": [LatentFile(**f) for f in values["files"]]})
        names = [file.name for file in manifest.files if not FILE_NAME.fullmatch(file.name)]
    except (TypeError, KeyError) as error:
        raise _damaged_manifest(folder, error) from error
    if names:
        raise ValueError(f"{folder}: {MANIFEST} names {names[0]!r}, which is no file of latents here; delete it, and run "
                         "the same `mdt-ray precompute` again")
    return manifest


def _damaged_manifest(folder: str, reason: object) -> ValueError:
    return ValueError(f"{folder}: {MANIFEST} is damaged ({reason}); delete it, and run the same `mdt-ray precompute` again")


def open_manifest(folder: str) -> Manifest:
    """Read the manifest and check that every file it lists is there with its size.

    Raises ValueError naming the folder or file that is missing or truncated, and the remedy.
    """
    manifest = read_manifest(folder)
    sizes = storage.list_sizes(folder)
    for file in manifest.files:
        if damage := damage_of(file, sizes):
            raise ValueError(f"{storage.join(folder, file.name)}: {damage}; {REBUILD}")
    return manifest


def damage_of(file: LatentFile, sizes: dict[str, int]) -> str:
    """What is wrong with a listed file, by the folder's listing: missing, or of another size; empty if nothing."""
    if file.name not in sizes:
        return "missing"
    found = sizes[file.name]
    return "" if found == file.num_bytes else f"{found} bytes, must be {file.num_bytes} (truncated or changed)"


def read_group(folder: str, file: LatentFile, group: int, shape: list[int], flip: bool,
               with_ids: bool = False) -> dict[str, np.ndarray]:
    """One row group as arrays: label (n,), moments (n, 2, C, h, w) float16 and, if asked, moments_flip and id.

    Tries again for a while where a store does not answer. Raises OSError after that, and ValueError naming a damaged file,
    or one without mirror images where they are asked for.
    """
    uri = storage.join(folder, file.name)
    columns = ["label", "moments"] + ["moments_flip"] * flip
    others = ["id"] * with_ids
    for pause in (*RETRY_SECONDS, None):
        try:
            metadata = _metadata(uri, file.sha256)
            fs, path = storage.resolve(uri)
            with fs.open_input_file(path) as handle:
                table = _read_columns(metadata, handle, group, columns + others)
            break
        except tables.Refused as error:
            raise ValueError(f"{uri}: {error}; {REBUILD}") from error
        except (OSError, ValueError) as error:
            if _is_damaged(uri, file):
                raise ValueError(f"{uri}: row group {group} is not readable ({error}); run the same `mdt-ray precompute` "
                                 "again") from error
            if pause is None:
                raise OSError(f"{uri}: could not be read ({error}); mend the access, and run the same command again"
                              ) from error
            time.sleep(pause)
    if missing := [name for name in columns + others if name not in table.column_names]:
        raise ValueError(f"{uri}: has no {missing[0]}; run `mdt-ray precompute{' --flip' * (missing[0] == 'moments_flip')}`")
    arrays = {name: table.column(name).to_numpy() for name in ["label", *others]}
    for name in columns[1:]:
        try:
            arrays[name] = binary_rows(table.column(name), (2, *shape))
        except ValueError as error:
            raise ValueError(f"{uri}: row group {group}: {name}: {error}; {REBUILD}") from error
    return arrays


def _is_damaged(uri: str, file: LatentFile) -> bool:
    """Whether a file that could not be used is not what was written. False too where its store does not answer."""
    try:
        return storage.sha256(storage.read_bytes(uri)) != file.sha256
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


@functools.lru_cache(maxsize=4096)
def _metadata(uri: str, sha256: str) -> pq.FileMetaData:
    """A file's own index, read and checked once."""
    fs, path = storage.resolve(uri)
    with fs.open_input_file(path) as handle:
        return _open_handle(handle).metadata


def _open_handle(handle: pa.NativeFile) -> pq.ParquetFile:
    """An open file of latents. Raises Refused as `tables.open_handle`, and for columns of other types."""
    file = tables.open_handle(handle)
    for name, kind in zip(file.schema_arrow.names, file.schema_arrow.types, strict=True):
        if kind not in COLUMN_TYPES:  # rows of some take memory that the file has no bytes for
            raise tables.Refused(f"its column {name} is of type {kind!s:.200}: not read")
    return file


def parse(data: bytes) -> pa.Table:
    """All columns of a whole file. Raises ValueError for what holds no latents as they are."""
    handle = pa.BufferReader(data)
    file = _open_handle(handle)
    return pa.concat_tables(_read_columns(file.metadata, handle, k, file.schema_arrow.names)
                            for k in range(file.num_row_groups))


def _read_columns(metadata: pq.FileMetaData, handle: pa.NativeFile, group: int, names: list[str]) -> pa.Table:
    """Of a row group. Raises Refused for pages that do not hold rows as they are: those might unpack to any size."""
    found = tables.fetch_group(metadata, handle, group, names)
    if any(pages.rows > pages.packed or not pages.encodings <= parquet_pages.PLAIN for pages in found.pages):
        raise tables.Refused("is packed: not read")
    batches = list(found.batches(max(metadata.row_group(group).num_rows, 1)))
    if not batches:
        raise ValueError("it is empty")
    return pa.Table.from_batches(batches)


def binary_rows(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """A binary column of equal rows as one float16 array, a view of its data buffer. Raises ValueError for others."""
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    if array.type != pa.binary():
        raise ValueError(f"is of type {array.type!s:.200}")
    size = int(np.prod(shape))
    ends = np.frombuffer(array.buffers()[1], dtype=np.int32)[array.offset:array.offset + len(array) + 1]
    if array.null_count or (np.diff(ends) != 2 * size).any():
        raise ValueError(f"its rows are not of {2 * size} bytes")
    data = np.frombuffer(array.buffers()[2], dtype=np.float16)
    return data[ends[0] // 2:ends[-1] // 2].reshape(len(array), *shape)
