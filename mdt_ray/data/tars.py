"""WebDataset tars: which samples a tar holds and where their pictures lie in it. Unpacks headers and labels, no picture."""

import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from mdt_ray import storage

MAX_LABEL_BYTES = 2**20
"""Of a member that holds a label."""
SEEK_BYTES, STREAM_BYTES = 2**17, 2**23
"""Read at once, of a disk and of a store: a disk skips most pictures; of a store, to read them takes less time than to ask
for each header."""
JSON_LABELS = ("label", "cls", "class_id", "class")
"""Keys of a sample's .json that may hold its label; the first that is there counts."""


@dataclass(frozen=True)
class Sample:
    key: str
    """Path in the tar up to the first dot of the file's name."""
    label: Any
    """As found: a number, a name, or None."""
    offset: int
    """Of the picture, in bytes from the tar's start."""
    size: int


def scan(folder: str, name: str, image_suffixes: frozenset[str]) -> list[Sample]:
    """The samples of a tar, in its order.

    Raises ValueError naming a tar that is damaged, compressed or truncated, and a sample without a picture.
    """
    fs, path = storage.resolve_below(folder, name)
    uri = storage.join(folder, name)
    samples: dict[str, dict[str, Any]] = {}
    try:
        with fs.open_input_file(path) as handle:
            length, end = handle.size(), 0
            reader = io.BufferedReader(handle, SEEK_BYTES if isinstance(fs, pafs.LocalFileSystem) else STREAM_BYTES)
            with tarfile.open(fileobj=reader, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # tarfile keeps every header otherwise
                    if member.size < 0 or member.sparse is not None:  # it would be read for ever; its size is anything
                        raise tarfile.TarError(f"{member.name!r} is sparse, or of {member.size} bytes")
                    if member.isfile():
                        _note(samples, tar, member, image_suffixes)
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            # Zeros end a tar. tarfile ends as quietly where a header is damaged, or another tar is appended.
            handle.seek(end)
            rest = handle.read(2**24)
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0") or end + len(rest) < length:
                raise ValueError(f"{uri}: truncated, damaged, or several tars in one, at byte {end} of {length}; make it "
                                 "again")
    except (OSError, tarfile.TarError) as error:  # pyarrow's errors too
        raise ValueError(f"{uri}: not a readable tar ({error}); make it again, uncompressed") from error
    for key, sample in samples.items():
        if "offset" not in sample:
            raise ValueError(f"{uri}: sample {key!r} has no picture")
    return [Sample(key=key, label=s.get("label"), offset=s["offset"], size=s["size"]) for key, s in samples.items()]


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_LABEL_BYTES:  # of a sparse member, the tar may hold much less
        raise tarfile.TarError(f"{member.name!r} has {member.size} bytes, and a label at most {MAX_LABEL_BYTES}")
    return tar.extractfile(member).read()


def _note(samples: dict[str, dict[str, Any]], tar: tarfile.TarFile, member: tarfile.TarInfo,
          image_suffixes: frozenset[str]) -> None:
    folder, slash, name = member.name.rpartition("/")
    if name.startswith("."):
        return
    stem, _, suffix = name.partition(".")
    key, suffix = folder + slash + stem, suffix.lower()
    sample = samples.setdefault(key, {})
    if suffix in sample.setdefault("suffixes", set()):
        raise tarfile.TarError(f"sample {key!r} occurs twice")
    sample["suffixes"].add(suffix)
    if suffix in image_suffixes:  # key.jpg, but not key.mask.png
        sample.setdefault("offset", member.offset_data)
        sample.setdefault("size", member.size)
    elif suffix == "cls":
        sample["label"] = _text(tar, member).decode(errors="replace").strip()
    elif suffix == "json" and "label" not in sample:
        try:
            values = json.loads(_text(tar, member))
        except (ValueError, RecursionError) as error:
            raise tarfile.TarError(f"{member.name!r} is no JSON: {error}") from error
        sample["label"] = next((values[k] for k in JSON_LABELS if k in values), None) if isinstance(values, dict) else None
