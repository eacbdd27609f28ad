"""What a source of labelled images holds: its files, and one row per image, found without decoding any of them.

A source is a folder of pictures (a subfolder per class, or a table of labels), Parquet files with `image` and `label`,
WebDataset tars, or `digits`. Not a reader of pictures: that is readers.py.
"""

import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mdt_ray import storage
from mdt_ray.data import tars

logger = logging.getLogger(__name__)
DIGITS = Path(__file__).parents[1] / "assets" / "digits"
IMAGE_SUFFIXES = frozenset(["bmp", "gif", "jfif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"])
LABEL_TABLES = ("labels.csv", "labels.parquet", "metadata.csv", "metadata.parquet")
"""Tables that give the labels of a folder of pictures, where it has no subfolder per class."""
FILE_COLUMNS, LABEL_COLUMNS = ("file", "file_name", "filename", "path", "image", "id"), ("label", "class", "cls")
SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test"])
SCAN_THREADS = 16
LARGE_ROW_GROUP = 20_000
MAX_CLASSES = 2**20
"""A label beyond is no class number but a mistake: the model has a row of weights for each."""

LISTING = pa.schema([("id", pa.string()), ("label", pa.int32()), ("file", pa.string()), ("offset", pa.int64()),
                     ("size", pa.int64())])
"""One row per image: in which file of the source it lies and where (bytes of a picture or tar, a row of Parquet)."""
FILES = pa.schema([("name", pa.string()), ("size", pa.int64()), ("time", pa.int64())])
"""The source's files by path below it, with what tells that they have not changed."""


@dataclass(frozen=True)
class Source:
    folder: str
    """URI of the folder that the files' names start from."""
    kind: str
    """`pictures`, `parquet` or `tar`."""
    files: pa.Table
    """As FILES, sorted by name."""
    labels: str
    """The table of labels (URI), where there is one."""

    @property
    def place(self) -> str:
        """The folder, whichever way its URI is written."""
        fs, path = storage.resolve(self.folder)
        return f"{fs.type_name}:{path.rstrip('/')}"

    @property
    def fingerprint(self) -> str:
        """Names and sizes of the files and the content of the table of labels: not the source's place, nor its times."""
        digest = hashlib.sha256()
        for name, size in zip(self.files["name"].to_pylist(), self.files["size"].to_pylist(), strict=True):
            digest.update(f"{name}\0{size}\n".encode())
        if self.labels:
            digest.update(storage.read_bytes(self.labels))
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Listing:
    """Every image of a source, as LISTING, sorted by file and place."""

    table: pa.Table
    class_names: list[str]


def open_source(uri: str, labels: str = "") -> Source:
    """Find the files of a source and what kind it is.

    Args:
        uri: `digits`, a folder, or a .parquet or .tar file; local or in an object store.
        labels: table of labels for a folder of pictures; by default one of LABEL_TABLES in it.
    Raises ValueError if there is nothing there, if it cannot be listed, or if it holds several kinds.
    """
    embedded = uri == "digits"
    if embedded:
        uri = str(DIGITS / "digits.parquet")
    folder, infos = _files_below(uri)
    tables = {name: storage.join(folder, name) for name in infos if name in LABEL_TABLES}
    kinds, ignored = _by_kind([n for n in sorted(infos.keys() - tables.keys()) if storage.join(folder, n) != labels])
    found = [kind for kind, names in kinds.items() if names]
    if not found:
        raise ValueError(f"source = {uri!r}: holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}), no *.parquet and no "
                         "*.tar (compressed tars cannot be read in parts: unpack them)")
    if len(found) > 1:
        raise ValueError(f"source = {uri!r}: holds " + " and ".join(f"{kind} ({kinds[kind][0]}, ...)" for kind in found) +
                         "; name a folder that holds one kind")
    if ignored:
        logger.warning("%s: %d other files are left out (%s)", uri, ignored.total(),
                       ", ".join(f"{n} {suffix}" for suffix, n in ignored.most_common(5)))
    names = kinds[found[0]]
    if labels and found[0] != "pictures":
        raise ValueError(f"labels = {labels!r}: the source's {found[0]} files carry their own labels; leave it out")
    if found[0] == "pictures" and not labels:
        if len(tables) == 1:
            labels = next(iter(tables.values()))
        elif tables or not any("/" in name for name in names):
            raise ValueError(f"source = {uri!r}: its pictures have no labels; give each class a subfolder, or name a table "
                             f"with columns file and label by --labels (found: {', '.join(tables) or 'none'})")
    times = [0 if embedded else infos[n].mtime_ns or 0 for n in names]  # an installation gives our own file a new time
    files = pa.table([names, [infos[n].size for n in names], times], schema=FILES)
    return Source(folder=folder, kind=found[0], files=files, labels=labels)


def _by_kind(names: list[str]) -> tuple[dict[str, list[str]], Counter[str]]:
    """Names of files by the kind of source that they make, and how many of which suffix make none."""
    kinds: dict[str, list[str]] = {"pictures": [], "parquet": [], "tar": []}
    ignored: Counter[str] = Counter()
    for name in names:
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            continue
        _, dot, suffix = name.rpartition("/")[2].rpartition(".")
        kind = "pictures" if suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
        if kind in kinds:
            kinds[kind].append(name)
        else:
            ignored[f".{suffix.lower()}" if dot else "without a suffix"] += 1
    return kinds, ignored


def _files_below(uri: str) -> tuple[str, dict[str, pafs.FileInfo]]:
    """A folder and the files below it by path; of a file, its folder and itself."""
    fs, path = storage.resolve(uri)
    try:
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise ValueError(f"source = {uri!r}: no such file or folder")
        if info.type == pafs.FileType.File:
            return storage.parent(uri), {info.base_name: info}
        infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
        root = path.rstrip("/") + "/"
        found = {i.path.removeprefix(root): i for i in infos if i.type == pafs.FileType.File}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"source = {uri!r}: cannot be listed ({error})") from error
    if isinstance(fs, pafs.LocalFileSystem):  # whose listing passes over links that lead nowhere
        for folder, _, names in os.walk(path, followlinks=True):
            for name in names:
                if os.path.join(folder, name).removeprefix(root) not in found:
                    raise ValueError(f"source = {uri!r}: {os.path.join(folder, name)!r} is a link that leads nowhere, or no "
                                     "file; mend or remove it")
    return uri, found


def write_files(uri: str, source: Source) -> None:
    """Keep the source's files as they are now, for `changes`."""
    storage.write_table(uri, source.files.replace_schema_metadata({"mdt_ray.place": source.place}), compression="zstd")


def changes(begun: pa.Table, source: Source) -> list[str]:
    """One line per file that was added, removed or changed; times count only where the source has not moved."""
    same_place = begun.schema.metadata[b"mdt_ray.place"].decode() == source.place
    before, after = ({name: (size, time) for name, size, time in zip(*(t[c].to_pylist() for c in FILES.names), strict=True)}
                     for t in (begun, source.files))
    lines = [f"{name}: removed" for name in before.keys() - after.keys()]
    lines += [f"{name}: added" for name in after.keys() - before.keys()]
    for name in before.keys() & after.keys():
        (size, time), (new_size, new_time) = before[name], after[name]
        if size != new_size:
            lines.append(f"{name}: {size} -> {new_size} bytes")
        elif same_place and time != new_time:
            lines.append(f"{name}: modified since")
    return sorted(lines)


# One row per image


def list_images(source: Source) -> Listing:
    """Find every image and its label.

    Raises ValueError for an image without a label, a label without a picture, an id that occurs twice, and a file that
    cannot be read.
    """
    ids, labels, places = _LISTERS[source.kind](source)
    numbers, names = _number_classes(source, ids, labels)
    files, offsets, sizes = zip(*places, strict=True) if places else ((), (), ())
    table = pa.table([ids, numbers, files, offsets, sizes], schema=LISTING)
    if not table.num_rows:
        raise ValueError(f"source = {source.folder!r}: holds no image")
    counts = pc.value_counts(table["id"])
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        name = twice[0]["values"].as_py()
        where = table.filter(pc.equal(table["id"], name))["file"].to_pylist()[:2]
        raise ValueError(f"source = {source.folder!r}: {len(twice)} ids occur twice, such as {name!r} "
                         f"(in {' and '.join(where)}); rename or remove the second (Parquet: or write null for image.path, "
                         "and images are named by file and row)")
    return Listing(table=table, class_names=names)


Rows = tuple[list[str], list[Any], list[tuple[str, int, int]]]
"""Ids, labels as found, and (file, offset, size)."""


def _list_pictures(source: Source) -> Rows:
    names = source.files["name"].to_pylist()
    places = [(name, 0, size) for name, size in zip(names, source.files["size"].to_pylist(), strict=True)]
    if source.labels:
        return names, _labels_from_table(source, names), places
    beside = [name for name in names if "/" not in name]
    if beside:
        raise ValueError(f"source = {source.folder!r}: {len(beside)} pictures lie beside the class folders, such as "
                         f"{beside[0]!r}; move them into the folder of their class")
    classes = {name.partition("/")[0] for name in names}
    if classes <= SPLITS:
        raise ValueError(f"source = {source.folder!r}: its folders are {', '.join(sorted(classes))}, not classes; name "
                         "one of them as the source")
    return names, [name.partition("/")[0] for name in names], places


def _labels_from_table(source: Source, names: list[str]) -> list[Any]:
    fs, path = storage.resolve(source.labels)
    try:
        with fs.open_input_file(path) as handle:
            as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(FILE_COLUMNS, pa.string()))  # 007 is no number
            table = pq.read_table(handle) if path.endswith(".parquet") else pyarrow.csv.read_csv(
                handle, convert_options=as_text)
    except (OSError, ValueError) as error:
        raise ValueError(f"labels = {source.labels!r}: not a readable CSV or Parquet table ({error})") from error
    columns = [next((c for c in wanted if c in table.column_names), None) for wanted in (FILE_COLUMNS, LABEL_COLUMNS)]
    if None in columns:
        raise ValueError(f"labels = {source.labels!r}: has columns {', '.join(table.column_names)}; needs file and label, "
                         "separated by commas")
    files = [name.removeprefix("./") for name in table[columns[0]].cast(pa.string()).to_pylist()]
    labels = dict(zip(files, table[columns[1]].to_pylist(), strict=True))
    if len(labels) < len(files):
        twice = next(name for name, n in Counter(files).items() if n > 1)
        raise ValueError(f"labels = {source.labels!r}: {twice!r} occurs twice; leave one row")
    missing, extra = [n for n in names if n not in labels], sorted(labels.keys() - set(names))
    if missing or extra:
        raise ValueError(f"labels = {source.labels!r}: " + " and ".join(
            f"{len(some)} {what}, such as {some[0]!r}"
            for some, what in ((missing, "pictures have no row"), (extra, "rows have no picture")) if some))
    return [labels[name] for name in names]


def _list_parquet(source: Source) -> Rows:
    ids, labels, places = [], [], []
    names = source.files["name"].to_pylist()
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        tables = pool.map(lambda n: _parquet_columns(source.folder, n), names)
        for name, table in zip(names, tables, strict=True):
            ids += [path or f"{name}#{row}" for row, path in enumerate(table["path"].to_pylist())]
            labels += table["label"].to_pylist()
            places += [(name, row, 0) for row in range(table.num_rows)]
    return ids, labels, places


def _parquet_columns(folder: str, name: str) -> pa.Table:
    """`path` (of the image, or null) and `label` of every row, without reading the images."""
    schema = _parquet_schema(folder, name)
    for column in ("image", "label"):
        if column not in schema.names:
            raise ValueError(f"{storage.join(folder, name)}: has no column {column!r}; expected image (struct of bytes, "
                             "path) and label")
    image = schema.field("image").type
    has_path = pa.types.is_struct(image) and image.get_field_index("path") >= 0
    fs, path = storage.resolve_below(folder, name)
    with fs.open_input_file(path) as handle:
        file = pq.ParquetFile(handle)
        largest = max((file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)), default=0)
        if largest > LARGE_ROW_GROUP:
            logger.warning("%s has row groups of %d rows; each is read from its start for every chunk in it. Written with "
                           "row groups of some hundred rows it would be read once", name, largest)
        table = file.read(columns=["label"] + ["image.path"] * has_path)
    paths = pc.struct_field(table["image"], "path") if has_path else pa.nulls(table.num_rows, pa.string())
    return pa.table({"path": paths, "label": table["label"]})


def _parquet_schema(folder: str, name: str) -> pa.Schema:
    """Raises ValueError for what is no Parquet file."""
    fs, path = storage.resolve_below(folder, name)
    try:
        return pq.read_schema(path, filesystem=fs)
    except (OSError, ValueError) as error:
        raise ValueError(f"{storage.join(folder, name)}: not a readable Parquet file ({error})") from error


def _list_tars(source: Source) -> Rows:
    ids, labels, places = [], [], []
    names = source.files["name"].to_pylist()
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        scans = pool.map(lambda n: tars.scan(source.folder, n, IMAGE_SUFFIXES), names)
        for name, samples in zip(names, scans, strict=True):
            ids += [f"{name.removesuffix('.tar')}/{sample.key}" for sample in samples]
            labels += [sample.label for sample in samples]
            places += [(name, sample.offset, sample.size) for sample in samples]
    return ids, labels, places


_LISTERS = {"pictures": _list_pictures, "parquet": _list_parquet, "tar": _list_tars}


def _number_classes(source: Source, ids: list[str], labels: list[Any]) -> tuple[np.ndarray, list[str]]:
    """Labels as numbers, and the classes' names: names are numbered in sorted order (ImageNet: synsets)."""
    if None in labels:
        raise ValueError(f"source = {source.folder!r}: {labels.count(None)} images have no label, such as "
                         f"{ids[labels.index(None)]!r}; give them one, or leave them out")
    folders = source.kind == "pictures" and not source.labels
    if labels and all(isinstance(label, str) for label in labels):
        if folders or not all(label.isdecimal() for label in labels):
            names = sorted(set(labels))
            numbers = {name: i for i, name in enumerate(names)}
            return np.array([numbers[label] for label in labels], np.int32), names
        labels = [int(label) for label in labels]
    labels = [int(label) if isinstance(label, float) and label.is_integer() else label for label in labels]
    names = _parquet_class_names(source) if source.kind == "parquet" else None
    limit, rule = (len(names), f"below the source's number of classes, {len(names)}") if names else \
        (MAX_CLASSES, f"a number from 0 to {MAX_CLASSES - 1} (or all labels are names)")
    for image_id, label in zip(ids, labels, strict=True):
        if type(label) is not int or not 0 <= label < limit:
            raise ValueError(f"source = {source.folder!r}: image {image_id!r} has label {label!r}: must be {rule}; correct "
                             "the label, or leave the image out")
    return np.array(labels, np.int32), names or [str(c) for c in range(max(labels, default=-1) + 1)]


def _parquet_class_names(source: Source) -> list[str] | None:
    """Names of the classes where the files carry Hugging Face's description of them."""
    metadata = _parquet_schema(source.folder, source.files["name"][0].as_py()).metadata or {}
    description = json.loads(metadata.get(b"huggingface", b"{}"))
    return description.get("info", {}).get("features", {}).get("label", {}).get("names")


# The listing on disk, in the order and the parts in which a job works through it


def write_parts(uri: str, listing: Listing, parts: Sequence[np.ndarray]) -> None:
    """Write a listing as Parquet whose row group k holds the images `parts[k]` (rows of the listing)."""
    buffer = io.BytesIO()
    schema = LISTING.with_metadata({"mdt_ray.class_names": json.dumps(listing.class_names)})
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(listing.table.take(pa.array(part)).cast(schema), row_group_size=max(len(part), 1))
    storage.write_bytes(uri, buffer.getvalue())


def read_parts(uri: str, parts: Sequence[int] | None = None) -> tuple[pa.Table, list[int], list[str]]:
    """What `write_parts` wrote: rows (of all parts, or of some), the number of rows of each part, and the class names.

    Raises FileNotFoundError, and ValueError naming a damaged file.
    """
    fs, path = storage.resolve(uri)
    try:
        with fs.open_input_file(path) as handle:
            file = pq.ParquetFile(handle)
            rows = file.read() if parts is None else file.read_row_groups(list(parts))
            sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
            return rows, sizes, json.loads(file.schema_arrow.metadata[b"mdt_ray.class_names"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{uri}: damaged ({error}); delete it and run the same command again") from error
