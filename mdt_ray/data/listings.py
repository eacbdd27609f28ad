"""One row per image of a source: its id, its label and where it lies, found without decoding any; and the plan of a job.

Not the source's files, which are sources.py, and not a reader of pictures, which is readers.py.
"""

import contextlib
import functools
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from mdt_ray import storage, tables
from mdt_ray.data import readers, tars
from mdt_ray.data.sources import IMAGE_SUFFIXES, Source

logger = logging.getLogger(__name__)
PLAN = "plan.parquet"
"""The listing of a `precompute`, a row group for each chunk."""
OUTSIDE = r"^/|(^|/)\.\.(/|$)"
"""What no name of a file below a folder has."""
FILE_COLUMNS, LABEL_COLUMNS = ("file", "file_name", "filename", "path", "image", "id"), ("label", "class", "cls")
SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test"])
SCAN_THREADS = 16
LARGE_ROW_GROUP = 20_000
NO_LABEL = -1
MAX_CLASSES = 2**20
"""A label beyond is no class number but a mistake: the model has a row of weights for each."""

LISTING = pa.schema([("id", pa.string()), ("label", pa.int32()), ("file", pa.string()), ("offset", pa.int64()),
                     ("size", pa.int64())])
"""One row per image: in which file of the source it lies and where (bytes of a picture or tar, a row of Parquet)."""


@dataclass(frozen=True)
class Listing:
    """Every image of a source, as LISTING, sorted by file and place."""

    table: pa.Table
    class_names: list[str]


def list_images(source: Source) -> Listing:
    """Find every image and its label.

    Raises ValueError for an image without a label, a label without a picture, an id that occurs twice, and a file that
    cannot be read.
    """
    ids, labels, places = _LISTERS[source.kind](source)
    numbers, names = _number_classes(source, ids, labels) if source.labelled else (labels, [])
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


def shuffled(count: int) -> np.ndarray:
    """range(count) in an order that is always the same, (count,)."""
    return np.random.Generator(np.random.PCG64(0)).permutation(count)


Rows = tuple[list[str], list[Any], list[tuple[str, int, int]]]
"""Ids, labels as found, and (file, offset, size)."""


def _list_pictures(source: Source) -> Rows:
    names = source.files["name"].to_pylist()
    places = [(name, 0, size) for name, size in zip(names, source.files["size"].to_pylist(), strict=True)]
    if source.labels:
        return names, _labels_from_table(source, names), places
    if not source.labelled:
        return names, [NO_LABEL] * len(names), places
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
            there, take = (_parquet_table if path.endswith(".parquet") else _csv_table)(handle)
            wanted = [next((c for c in some if c in there), None) for some in (FILE_COLUMNS, LABEL_COLUMNS)]
            found = take(wanted) if None not in wanted else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"labels = {source.labels!r}: not a readable CSV or Parquet table ({error})") from error
    if not found:
        raise ValueError(f"labels = {source.labels!r}: has columns {', '.join(there)}; needs file and label, separated by "
                         "commas")
    files = [str(name).removeprefix("./") for name in found[wanted[0]]]
    labels = dict(zip(files, found[wanted[1]], strict=True))
    if len(labels) < len(files):
        twice = next(name for name, n in Counter(files).items() if n > 1)
        raise ValueError(f"labels = {source.labels!r}: {twice!r} occurs twice; leave one row")
    missing, extra = [n for n in names if n not in labels], sorted(labels.keys() - set(names))
    if missing or extra:
        raise ValueError(f"labels = {source.labels!r}: " + " and ".join(
            f"{len(some)} {what}, such as {some[0]!r}"
            for some, what in ((missing, "pictures have no row"), (extra, "rows have no picture")) if some))
    return [labels[name] for name in names]


def _csv_table(handle: pa.NativeFile) -> tuple[list[str], Callable]:
    """Names of its columns, and what reads some of them."""
    as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(FILE_COLUMNS, pa.string()))  # 007 is no number
    table = pyarrow.csv.read_csv(handle, convert_options=as_text)
    return table.column_names, lambda names: table.select(names).to_pydict()


def _parquet_table(handle: pa.NativeFile) -> tuple[list[str], Callable]:
    file = tables.open_handle(handle)
    return file.schema_arrow.names, functools.partial(tables.values, file, handle)


def _scan_parquet(folder: str, name: str, labelled: bool = True) -> Rows:
    """Paths and labels of a file's rows, without reading the images."""
    with _open_parquet(folder, name) as (file, handle):
        schema = file.schema_arrow
        for column in ("image", "label") if labelled else ("image",):
            if column not in schema.names:
                raise ValueError(f"{storage.join(folder, name)}: has no column {column!r}; expected image (struct of bytes, "
                                 "path) and label")
        image = schema.field("image").type
        has_path = (pa.types.is_struct(image) and image.get_field_index("path") >= 0
                    and tables.is_text(image.field("path").type))
        largest = max((file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)), default=0)
        if largest > LARGE_ROW_GROUP:
            logger.warning("%s has row groups of %d rows; each is read from its start for every chunk in it. Written with "
                           "row groups of some hundred rows it would be read once", name, largest)
        try:
            readers.picture_column(schema)
            found = tables.values(file, handle, ["label"] * labelled + ["image.path"] * has_path)
        except ValueError as error:
            raise ValueError(f"{storage.join(folder, name)}: {error}") from error
        count = file.metadata.num_rows
    ids = [path or f"{name}#{row}" for row, path in enumerate(found.get("image.path", [None] * count))]
    labels = found.get("label", [NO_LABEL] * count)
    return ids, labels, [(name, row, 0) for row in range(count)]


@contextlib.contextmanager
def _open_parquet(folder: str, name: str) -> Iterator[tuple[pq.ParquetFile, pa.NativeFile]]:
    """Raises ValueError for what is no Parquet file."""
    fs, path = storage.resolve_below(folder, name)
    try:
        handle = storage.patiently(fs, lambda: fs.open_input_file(path))
        file = storage.patiently(fs, lambda: tables.open_handle(handle))
    except (OSError, ValueError) as error:
        raise ValueError(f"{storage.join(folder, name)}: not a readable Parquet file ({error})") from error
    with handle:
        yield file, handle


def _scan_tar(folder: str, name: str, labelled: bool = True) -> Rows:
    samples = tars.scan(folder, name, IMAGE_SUFFIXES)
    labels = [sample.label if labelled else NO_LABEL for sample in samples]
    return ([f"{name.removesuffix('.tar')}/{sample.key}" for sample in samples], labels,
            [(name, sample.offset, sample.size) for sample in samples])


def _scan_files(source: Source, scan: Callable[[str, str, bool], Rows]) -> Rows:
    """What `scan` finds in each file, in the files' order."""
    ids, labels, places = [], [], []
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for found in pool.map(lambda name: scan(source.folder, name, source.labelled), source.files["name"].to_pylist()):
            ids += found[0]
            labels += found[1]
            places += found[2]
    return ids, labels, places


_LISTERS: dict[str, Callable[[Source], Rows]] = {
    "pictures": _list_pictures, "parquet": functools.partial(_scan_files, scan=_scan_parquet),
    "tar": functools.partial(_scan_files, scan=_scan_tar)}


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
    with _open_parquet(source.folder, source.files["name"][0].as_py()) as (file, _):
        metadata = file.schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (LookupError, TypeError, ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


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

    Raises FileNotFoundError, OSError where the store does not answer, and ValueError naming a damaged file.
    """
    fs, path = storage.resolve(uri)

    def read() -> tuple[pa.Table, list[int], list[str]]:
        with fs.open_input_file(path) as handle:
            file = tables.open_handle(handle)
            rows = tables.read_groups(file, handle, range(file.num_row_groups) if parts is None else parts)
            sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
            if pc.any(pc.match_substring_regex(rows["file"], OUTSIDE)).as_py():
                raise ValueError("names files outside the source")
            return rows, sizes, json.loads(file.schema_arrow.metadata[b"mdt_ray.class_names"])

    try:
        return storage.patiently(fs, read)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        storage.read_bytes(uri)  # where that fails too, it is the store, and nothing is known of the file
        raise ValueError(f"{uri}: damaged ({error}); delete it and run the same command again") from error
