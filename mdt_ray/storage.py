"""Files at a URI (local path, s3://, gs://, hdfs://: what pyarrow's filesystems open), written whole or not at all.

A local file is written under a temporary name and renamed; an object store makes an object visible only when its upload is
complete. Not a cache and not a copy tool.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs

from mdt_ray import config_io, scratch

T = TypeVar("T")
logger = logging.getLogger(__name__)
PART_BYTES = 16 * 2**20
"""Of a local file that are in memory at once while it goes to an object store, or comes from there."""
PUT_BYTES = 8 * 2**20
"""Up to here an object goes to S3 in one request, which the store takes whole or not at all. (Arrow does so below 10 MB.)"""
REPLACED_SECONDS = (0.1, 1.0)
"""Waits before what makes no sense is read again."""
RETRY_SECONDS = (1.0, 5.0, 20.0)
"""Waited before a store is asked again."""
REFUSALS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "NO_SUCH_UPLOAD")
"""In the errors of stores that would say the same again."""
MENDABLE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""Beside refusals, what a store says that does answer, for somebody to mend."""
REGION = "When resolving region"
"""How pyarrow's error begins where S3 does not say in which region a bucket is."""
TEMPORARY = ".tmp-"
"""In the names of what is not whole yet, or of no use for longer than a run."""
FULL_BYTES = 2**20
"""A disk with less room than this was full when a write failed."""


class NoRoom(OSError):
    """A disk, or what a user may take of one, is full: trying again on another node does not help."""


def absolute(uri: str) -> str:
    """The URI with a local path made absolute (Ray's workers change directory)."""
    return uri if "://" in uri else os.path.abspath(Path(uri).expanduser())


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI and the path in it. Raises ValueError for a URI that no filesystem opens, or that holds a
    secret, and OSError where S3 does not say for some time in which region a bucket is, which a process asks it once."""
    config_io.refuse_secrets("path", uri)
    where = absolute(uri)
    if where.startswith("s3://"):  # small objects in one request instead of three
        where += f"{'&' if '?' in where else '?'}allow_delayed_open=true"

    def open_() -> tuple[pafs.FileSystem, str]:
        try:
            return pafs.FileSystem.from_uri(where)
        except (ValueError, OSError, NotImplementedError) as error:
            if REGION in str(error):
                raise
            raise ValueError(f"cannot open {uri!r}: {error}; use a local path or s3://, gs://, hdfs://") from error

    return _again(open_, RETRY_SECONDS)


def resolve_below(folder: str, name: str) -> tuple[pafs.FileSystem, str]:
    """As `resolve`, of a file below a folder whose name may hold any character (in a URI some would need escapes)."""
    fs, path = resolve(folder)
    return fs, f"{path.rstrip('/')}/{name}"


def name(uri: str) -> str:
    """The last part of a path, without the query string."""
    return base(uri).rstrip("/").rpartition("/")[2]


def is_local(uri: str) -> bool:
    return isinstance(resolve(uri)[0], pafs.LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """Append path parts, keeping a query string (`s3://bucket/a?endpoint_override=...`) at the end."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([base.rstrip("/"), *parts]) + mark + query


def parent(uri: str) -> str:
    """The folder that holds a file or folder, with the query string of the URI."""
    base, mark, query = uri.partition("?") if "://" in uri else (absolute(uri), "", "")
    return base.rstrip("/").rpartition("/")[0] + mark + query


def base(uri: str) -> str:
    """The URI without its query string."""
    return uri.partition("?")[0] if "://" in uri else uri


def exists(uri: str) -> bool:
    fs, path = resolve(uri)
    return patiently(fs, lambda: fs.get_file_info(path)).type != pafs.FileType.NotFound


def list_names(uri: str) -> list[str]:
    """Sorted names of a folder's children; empty if there is no such folder."""
    return sorted(info.base_name for info in _children(uri))


def list_sizes(uri: str) -> dict[str, int]:
    """Sizes of a folder's files by name; empty if there is no such folder."""
    return {info.base_name: info.size for info in _children(uri) if info.type == pafs.FileType.File}


def _children(uri: str) -> list[pafs.FileInfo]:
    fs, path = resolve(uri)
    return patiently(fs, lambda: fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)))


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    return _read(*resolve(uri))


def _read(fs: pafs.FileSystem, path: str) -> bytes:
    def read() -> bytes:
        with fs.open_input_stream(path) as stream:
            return stream.read()

    return patiently(fs, read)


def parsed(uri: str, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of the whole file. Raises FileNotFoundError, and what `parse` raises.

    From a store, another try or two follow a ValueError: of an object that is replaced by a longer or shorter one between
    the two requests that reading takes, pyarrow returns as many bytes as it had before, the last ones remains of memory.
    """
    fs, path = resolve(uri)
    for pause in () if isinstance(fs, pafs.LocalFileSystem) else REPLACED_SECONDS:
        try:
            return parse(_read(fs, path))
        except ValueError:
            time.sleep(pause)
    return parse(_read(fs, path))


def patiently(fs: pafs.FileSystem, call: Callable[[], T]) -> T:
    """What `call` returns; from a store that does not answer, or breaks off, also after some time. (The SDKs' own patience
    is a few seconds where connections are refused.)"""
    return _again(call, waits(fs))


def _again(call: Callable[[], T], pauses: Iterable[float]) -> T:
    """What `call` returns, after each of the pauses too where an OSError but no refusal came before."""
    for pause in pauses:
        try:
            return call()
        except OSError as error:
            if isinstance(error, FileNotFoundError) or is_refusal(error):
                raise
            logger.warning("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
    return call()


def is_refusal(error: BaseException) -> bool:
    """Whether a file system said no, and would the next time."""
    return isinstance(error, PermissionError) or any(word in str(error) for word in REFUSALS)


@contextmanager
def outages_told() -> Iterator[None]:
    """A ValueError that comes of a store or a hub which did not answer, as the OSError that it was."""
    try:
        yield
    except ValueError as error:
        cause = error.__cause__
        while cause is not None:
            if isinstance(cause, OSError) and not isinstance(cause, MENDABLE) and not is_refusal(cause):
                raise OSError(str(error)) from error
            cause = cause.__cause__
        raise


def waits(fs: pafs.FileSystem) -> tuple[float, ...]:
    """Seconds to wait before each further try; a disk has failed for good the first time."""
    return () if isinstance(fs, pafs.LocalFileSystem) else RETRY_SECONDS


def read_json(uri: str) -> Any:
    """Parsed JSON. Raises FileNotFoundError, or ValueError naming a damaged file."""
    try:
        return parsed(uri, json.loads)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{uri}: damaged JSON ({error}); delete it and run the same command again") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Create or replace a file, whole. Raises OSError naming the file and what to do, with nothing half-written left."""
    fs, path = resolve(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        with create_file(uri) as file:
            file.write_bytes(data)
    else:
        with _naming(uri):
            _write_object(fs, path, lambda: [data], len(data))


@contextmanager
def create_file(uri: str) -> Iterator[Path]:
    """A local path to write a file of any size at, piece by piece; it becomes the file at `uri`, whole, where the block ends
    without an error, and else is deleted. Raises OSError as `write_bytes`."""
    with _made_apart(uri) as (fs, path, temporary):
        yield temporary
        if isinstance(fs, pafs.LocalFileSystem):
            os.replace(temporary, path)
        else:
            _upload(fs, temporary, path)


@contextmanager
def _made_apart(uri: str) -> Iterator[tuple[pafs.FileSystem, str, Path]]:
    """The filesystem and path of a file or folder to come, and a local path to make it at, where nothing stays."""
    fs, path = resolve(uri)
    path = path.rstrip("/")
    temporary = Path(_temporary(path)) if isinstance(fs, pafs.LocalFileSystem) else scratch.new_path()
    try:
        with _naming(uri):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            yield fs, path, temporary
    finally:
        scratch.discard(temporary)


@contextmanager
def _naming(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = NoRoom if error.errno in (errno.ENOSPC, errno.EDQUOT) else OSError
        raise kind(f"{uri}: could not be written ({error.strerror or error}); make room or mend the access, and run the "
                   "same command again") from error


def _upload(fs: pafs.FileSystem, file: Path, path: str) -> None:
    def parts() -> Iterator[bytes]:
        with file.open("rb") as stream:
            yield from iter(lambda: stream.read(PART_BYTES), b"")

    _write_object(fs, path, parts, file.stat().st_size)


def _write_object(fs: pafs.FileSystem, path: str, parts: Callable[[], Iterable[bytes]], size: int) -> None:
    def facts() -> tuple[int | None, int | None]:
        info = patiently(fs, lambda: fs.get_file_info(path))
        return info.size, info.mtime_ns

    def write(pieces: Iterable[bytes]) -> None:
        with fs.open_output_stream(path) as stream:
            for piece in pieces:
                stream.write(piece)

    if fs.type_name == "s3" and size <= PUT_BYTES:
        data = b"".join(parts())
        return patiently(fs, lambda: write([data]))
    before = facts()
    try:
        patiently(fs, lambda: write(parts()))
    finally:
        # A stream that is closed after a failed write may have completed an upload that lacks its end.
        after = facts()
        if after[0] is not None and after[0] != size and after != before:
            fs.delete_file(path)
            raise OSError(f"{after[0]} bytes arrived of {size}")


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1) + "\n").encode())


def move(uri: str, target: str) -> None:
    """Rename a file on the same filesystem."""
    fs, path = resolve(uri)
    patiently(fs, lambda: fs.move(path, resolve(target)[1]))


def remove(uri: str) -> None:
    """Delete a file or a folder with all it holds; nothing if it is not there."""
    fs, path = resolve(uri)

    def delete() -> None:
        kind = fs.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            fs.delete_dir(path)
        elif kind == pafs.FileType.File:
            fs.delete_file(path)

    patiently(fs, delete)


def _temporary(path: str) -> str:
    """A name of a writer's own (a process id is not unique among hosts that share a disk), for `clear_leftovers` to know."""
    return f"{path}{TEMPORARY}{uuid.uuid4().hex}"


def clear_leftovers(uri: str) -> None:
    """Delete what killed writers left half-written in a folder, not below it. For its one owner."""
    for name in list_names(uri):
        if TEMPORARY in name:
            with suppress(OSError):  # a writer that outlives its run may change it meanwhile; the next run looks again
                remove(join(uri, name))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def create_folder(uri: str, *, last: str) -> Iterator[Path]:
    """A local folder to write files in, piece by piece; it becomes the folder at `uri`, in place of one that is there, where
    the block ends without an error, and else is deleted. The file `last` arrives after all others and marks it as whole.
    Raises OSError as `write_bytes`."""
    with _made_apart(uri) as (fs, path, temporary):
        temporary.mkdir()
        try:
            yield temporary
        except Exception as error:  # what writes weights has errors of its own for a full disk
            full = os.strerror(errno.ENOSPC)
            # (That it is full: by the time of asking, others may have made room.)
            if isinstance(error, OSError) or (full not in str(error) and shutil.disk_usage(temporary).free > FULL_BYTES):
                raise
            raise OSError(errno.ENOSPC, f"{full} at {temporary.parent}") from error
        if isinstance(fs, pafs.LocalFileSystem):
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
        else:
            remove(join(uri, last))  # the old one's: until the new one's is there, the folder is not whole
            files = (f for f in temporary.rglob("*") if f.is_file())
            for file in sorted(files, key=lambda f: (f.name == last, str(f))):
                _upload(fs, file, f"{path}/{file.relative_to(temporary).as_posix()}")


@contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """The folder as a local path: itself where it is local already, else a copy that goes where the block ends. Raises
    ValueError for a file whose name would leave that."""
    fs, path = resolve(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        yield Path(path)
        return
    copy = scratch.new_path()
    try:
        for info in patiently(fs, lambda: fs.get_file_info(pafs.FileSelector(path, recursive=True))):
            if info.type == pafs.FileType.File:
                name = Path(info.path).relative_to(path)
                if ".." in name.parts:
                    raise ValueError(f"{uri}: holds a file {str(name)!r}, which is outside of it; delete that")
                _download(fs, info.path, copy / name)
        yield copy
    finally:
        scratch.discard(copy)


def _download(fs: pafs.FileSystem, path: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)

    def copy() -> None:
        with fs.open_input_stream(path) as stream, target.open("wb") as file:
            shutil.copyfileobj(stream, file, PART_BYTES)

    patiently(fs, copy)
