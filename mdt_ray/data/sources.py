"""A source of labelled images: which kind it is, which files it holds, and whether they have changed.

A source is a folder of pictures (a subfolder per class, or a table of labels), Parquet files with `image` and `label`,
WebDataset tars, or `digits`. Which images are in the files is listings.py.
"""

import hashlib
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs as pafs

from mdt_ray import storage, tables

logger = logging.getLogger(__name__)
ASSETS = Path(__file__).parents[1] / "assets"
DIGITS = ASSETS / "digits"
IMAGE_SUFFIXES = frozenset(["bmp", "gif", "jfif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"])
LABEL_TABLES = ("labels.csv", "labels.parquet", "metadata.csv", "metadata.parquet")
"""Tables that give the labels of a folder of pictures, where it has no subfolder per class."""
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
    labelled: bool = True
    """False where labels are not to be looked at."""

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


def open_source(uri: str, labels: str = "", need_labels: bool = True) -> Source:
    """Find the files of a source and what kind it is.

    Args:
        uri: `digits`, a folder, or a .parquet or .tar file; local or in an object store.
        labels: table of labels for a folder of pictures; by default one of LABEL_TABLES in it.
        need_labels: False takes all images without labels, whatever there is.
    Raises ValueError if there is nothing there, if it cannot be listed, or if it holds several kinds.
    """
    embedded = uri == "digits"
    if embedded:
        uri = str(DIGITS / "digits.parquet")
    folder, infos = _files_below(uri)
    beside = {name: storage.join(folder, name) for name in infos if name in LABEL_TABLES}
    kinds, ignored = _by_kind([n for n in sorted(infos.keys() - beside.keys()) if storage.join(folder, n) != labels])
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
    names, labelled = kinds[found[0]], True
    if labels and found[0] != "pictures":
        raise ValueError(f"labels = {labels!r}: the source's {found[0]} files carry their own labels; leave it out")
    if not need_labels and not labels:
        labelled = False
    elif found[0] == "pictures" and not labels:
        if len(beside) == 1:
            labels = next(iter(beside.values()))
        elif beside or not any("/" in name for name in names):
            raise ValueError(f"source = {uri!r}: its pictures have no labels; give each class a subfolder, or name a table "
                             f"with columns file and label by --labels (found: {', '.join(beside) or 'none'})")
    times = [0 if embedded else infos[n].mtime_ns or 0 for n in names]  # an installation gives our own file a new time
    files = pa.table([names, [infos[n].size for n in names], times], schema=FILES)
    return Source(folder=folder, kind=found[0], files=files, labels=labels, labelled=labelled)


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
        info = storage.patiently(fs, lambda: fs.get_file_info(path))
        if info.type == pafs.FileType.NotFound:
            raise ValueError(f"source = {uri!r}: no such file or folder")
        if info.type == pafs.FileType.File:
            return storage.parent(uri), {info.base_name: info}
        infos = storage.patiently(fs, lambda: fs.get_file_info(pafs.FileSelector(path, recursive=True)))
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
    tables.write(uri, source.files.replace_schema_metadata({"mdt_ray.place": source.place}), compression="zstd")


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
