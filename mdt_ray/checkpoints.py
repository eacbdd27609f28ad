"""Which checkpoints a folder holds and whether they are whole. Not what is in them: that is training/state.py."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from mdt_ray import storage, tables

logger = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "ema_snapshots"
"""Folders of a training output that hold checkpoints, and snapshots of averages (training/snapshots.py)."""
CHECKSUMS = "checksums.json"


def name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(uri: str) -> int:
    """The step in a checkpoint's name."""
    return int(uri.rpartition("step-")[2].partition("?")[0])


def _named(folder: str) -> list[str]:
    """What lies in a folder and has a checkpoint's name, oldest first."""
    return [found for found in storage.list_names(folder) if re.fullmatch(r"step-\d{8,}", found)]


def kept(steps: list[int], keep_last: int, keep_every_steps: int) -> list[int]:
    """Of checkpoints at these steps, oldest first, those that stay: the newest `keep_last`, and those at a multiple of
    `keep_every_steps` (0: none), step 0 among them."""
    return [step for step in steps if step in steps[-keep_last:] or (keep_every_steps and step % keep_every_steps == 0)]


@contextlib.contextmanager
def create(uri: str) -> Iterator[Path]:
    """A local folder to write a checkpoint's files in; as storage.create_folder, with the checksums of the files, which
    arrive last and mark it as whole."""
    with storage.create_folder(uri, last=CHECKSUMS) as folder:
        yield folder
        sums = {str(f.relative_to(folder)): storage.sha256(f.read_bytes()) for f in sorted(folder.rglob("*")) if f.is_file()}
        (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def list_finished(output: str, kind: str = CHECKPOINTS) -> list[str]:
    """URIs of finished checkpoints (or SNAPSHOTS) of a training output, oldest first."""
    folder = storage.join(output, kind)
    return [storage.join(folder, n) for n in _named(folder) if storage.exists(storage.join(folder, n, CHECKSUMS))]


def damage(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint's files on this machine, by its checksums; None if nothing is."""
    file = Path(folder) / CHECKSUMS
    if not file.is_file():
        return f"{CHECKSUMS} is missing"
    try:
        sums = json.loads(file.read_bytes())
    except ValueError as error:
        return f"{CHECKSUMS} is no JSON: {error}"
    return _first_wrong(sums, Path(folder)) if isinstance(sums, dict) and sums else f"{CHECKSUMS} has no checksums"


def check_part(uri: str, part: str, folder: Path) -> None:
    """Raise ValueError if files of a part of a checkpoint (such as `ema`), fetched to `folder`, are not what its checksums
    say. What has none, such as a pipeline from a hub, is taken as it is."""
    if not storage.exists(storage.join(uri, CHECKSUMS)):
        return
    sums = storage.read_json(storage.join(uri, CHECKSUMS))
    names = [name for name in sums if name.startswith(f"{part}/")] if isinstance(sums, dict) else []
    wrong = _first_wrong({name.removeprefix(f"{part}/"): sums[name] for name in names}, folder)
    if wrong or not names:
        raise ValueError(f"checkpoint {uri}: {f'{part}/{wrong}' if wrong else f'{CHECKSUMS} names no file of {part}'}; "
                         "bring it back, or take another checkpoint")


def _first_wrong(sums: dict[str, str], folder: Path) -> str | None:
    """Of files below a folder, what is wrong with the first that is not what its checksum says."""
    for name, expected in sums.items():
        if {"", ".", ".."} & set(name.split("/")):
            return f"{CHECKSUMS} names {name!r}, which is no file of it"
        file = folder.joinpath(*name.split("/"))
        if not file.is_file():
            return f"{name} is missing"
        if storage.sha256(file.read_bytes()) != expected:
            return f"{name} does not have its checksum"
    return None


@contextlib.contextmanager
def newest(output: str) -> Iterator[tuple[str | None, Path | None]]:
    """The newest undamaged checkpoint of a training output and its files on this machine while the block runs, or twice
    None. A damaged one is passed over with a warning.

    Raises ValueError if there are some and none is whole: to begin anew is not for us to decide.
    """
    found = list_finished(output)
    for uri in reversed(found):
        with storage.fetched(uri) as folder:
            fault = damage(folder)
            if fault is None:
                yield uri, folder
                return
        logger.warning("checkpoint %s is damaged (%s); taking the one before it", uri, fault)
    if found:
        raise ValueError(f"{output}: none of its {len(found)} checkpoints is whole; bring one back, or delete the folder to "
                         "begin anew")
    yield None, None


def latest(output: str) -> str | None:
    """The URI of `newest`."""
    with newest(output) as (uri, _):
        return uri


def drop_after(output: str, step: int) -> None:
    """Delete what is beyond a step that training goes on from (checkpoints passed over as damaged) and what a killed writer
    left without its mark: neither may count as the newest, or take the place of one that is kept. For the one owner."""
    folder = storage.join(output, CHECKPOINTS)
    storage.clear_leftovers(folder)
    for found in _named(folder):
        uri = storage.join(folder, found)
        if step_of(found) > step or not storage.exists(storage.join(uri, CHECKSUMS)):
            remove(uri)


def remove(uri: str) -> None:
    """Delete a checkpoint. The mark of a whole one goes first, so that a kill in between leaves no half of one."""
    storage.remove(storage.join(uri, CHECKSUMS))
    storage.remove(uri)


def steps_done(output: str) -> int:
    """The step of the newest undamaged checkpoint, 0 if there is none."""
    found = latest(output)
    return step_of(found) if found else 0


def newest_step(output: str) -> int:
    """The step of the newest checkpoint by its name, without looking whether it is damaged; 0 if there is none."""
    found = list_finished(output)
    return step_of(found[-1]) if found else 0


def is_here(uri: str) -> bool:
    """Whether `uri` is a checkpoint or a training output."""
    return any(storage.exists(storage.join(uri, name)) for name in (CHECKSUMS, CHECKPOINTS))


def resolve(uri: str) -> str:
    """A checkpoint folder: `uri` itself, or the newest one of the training output `uri`. Raises ValueError if none."""
    if storage.exists(storage.join(uri, CHECKSUMS)):
        return uri
    found = latest(uri)
    if found is None:
        raise ValueError(f"checkpoint = {uri!r}: neither a checkpoint nor a training output with one; run `mdt-ray train`")
    return found


def write_metrics(uri: str, rows: list[dict]) -> None:
    """Write a metrics.parquet, whole. A row may lack columns; those are null."""
    names = dict.fromkeys(name for row in rows for name in row)
    tables.write(uri, pa.table({name: [row.get(name) for row in rows] for name in names}))


def read_metrics(uri: str) -> list[dict]:
    """The rows of a metrics.parquet, each without the columns that it lacked. Raises FileNotFoundError, and ValueError for
    what is no table of numbers and short texts."""
    found = tables.read_values(uri)
    rows = zip(*found.values(), strict=True)
    return [{name: value for name, value in zip(found, row, strict=True) if value is not None} for row in rows]
