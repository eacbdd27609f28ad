"""Small sources of every kind, made of the same real encodings, for tests of what reads them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(size: tuple[int, int] = (40, 32), mode: str = "RGB", seed: int = 0, kind: str = "png", **options) -> bytes:
    """A smooth random picture, encoded."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(root: Path, rows: list[tuple[str, bytes]]) -> Path:
    """Files by path below root."""
    for name, data in rows:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_parquet(path: Path, rows: list[tuple[bytes, object]], metadata: dict | None = None, named: bool = True,
                  row_group_size: int = 3, **options) -> Path:
    """As Hugging Face's ImageNet: image (struct of bytes, path) and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({
        "image": pa.array([{"bytes": data, "path": f"{path.stem}-{i}.png" if named else None}
                           for i, (data, _) in enumerate(rows)], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array([label for _, label in rows])})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=row_group_size, **options)
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, data: bytes, label: object, form: str = "cls", suffix: str = "jpg") -> list[tuple[str, bytes]]:
    """The members of one WebDataset sample."""
    body = str(label).encode() if form == "cls" else json.dumps({"label": label, "caption": "x"}).encode()
    return [(f"{key}.{suffix}", data), (f"{key}.{form}", body)]
