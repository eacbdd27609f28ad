"""Encoded images in, square uint8 RGB arrays out; and the Parquet layout of Hugging Face's ImageNet that they come in.

Not a pipeline: jobs/precompute.py drives it.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from PIL import Image

from mdt_ray import storage

DIGITS = Path(__file__).parents[1] / "assets" / "digits"


@dataclass(frozen=True)
class SourceFile:
    """A Parquet file of images, and what tells that it has not changed."""

    uri: str
    name: str
    """Path below the source: the same wherever the source lies."""
    num_rows: int
    size: int


@dataclass(frozen=True)
class SourceImage:
    id: str
    label: int
    data: bytes
    """The encoded file."""


def list_source(source: str) -> list[SourceFile]:
    """The Parquet files of a source (a file, a folder, or `digits`), sorted by name.

    Raises ValueError if there is none, or if a file is not a Parquet file with `image` and `label`.
    """
    uri = str(DIGITS / "digits.parquet") if source == "digits" else source
    fs, path = storage.resolve(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise ValueError(f"source = {source!r}: no such file or folder")
    if info.type == pafs.FileType.File:
        infos = [info]
    else:
        infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
        infos = sorted((i for i in infos if i.extension == "parquet"), key=lambda i: i.path)
    if not infos:
        raise ValueError(f"source = {source!r}: holds no *.parquet file")
    local = isinstance(fs, pafs.LocalFileSystem)
    files = []
    for i in infos:
        try:
            metadata = pq.read_metadata(i.path, filesystem=fs)
        except (OSError, ValueError) as error:
            raise ValueError(f"{i.path}: not a readable Parquet file ({error})") from error
        for column in ("image", "label"):
            if column not in metadata.schema.to_arrow_schema().names:
                raise ValueError(f"{i.path}: has no column {column!r}; expected image (struct of bytes, path) and label")
        name = i.path[len(path):].lstrip("/") or i.base_name
        files.append(SourceFile(uri=i.path if local else storage.join(source, name), name=name,
                                num_rows=metadata.num_rows, size=i.size))
    return files


def source_fingerprint(files: list[SourceFile]) -> list[dict]:
    """What of a source is part of a run's identity: names, rows and sizes, not its place."""
    return [{key: value for key, value in asdict(f).items() if key != "uri"} for f in files]


def read_images(file: SourceFile, start: int, stop: int) -> Iterator[SourceImage]:
    """Rows start..stop of a file, reading only the row groups that hold them.

    An image's id is its path where the file names one, else file name and row.
    """
    fs, path = storage.resolve(file.uri)
    with fs.open_input_file(path) as handle:
        parquet = pq.ParquetFile(handle)
        first = 0
        for group in range(parquet.num_row_groups):
            last = first + parquet.metadata.row_group(group).num_rows
            if first < stop and start < last:
                rows = parquet.read_row_group(group, columns=["image", "label"])
                rows = rows.slice(max(start - first, 0), min(stop, last) - max(start, first))
                for offset, row in enumerate(rows.to_pylist(), start=max(start, first)):
                    name = row["image"].get("path") or f"{file.name}#{offset}"
                    yield SourceImage(id=name, label=row["label"], data=row["image"]["bytes"])
            first = last


def decode_image(data: bytes) -> Image.Image:
    """An encoded image as RGB. Raises ValueError for bytes that are no whole image."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image ({error})") from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's square crop: halve by box filter while the short side is at least 2 x size, bicubic to size, cut the centre.

    Returns (size, size, 3) uint8.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def to_unit_range(images: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) on [-1, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1


def class_names(source: str) -> list[str] | None:
    """Names of the classes where the Parquet files carry Hugging Face's description of them, else None."""
    fs, path = storage.resolve(list_source(source)[0].uri)
    metadata = pq.read_schema(path, filesystem=fs).metadata or {}
    description = json.loads(metadata.get(b"huggingface", b"{}"))
    return description.get("info", {}).get("features", {}).get("label", {}).get("names")
