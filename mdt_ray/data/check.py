"""Are the latents on disk what the manifest says, and what is in them? Reads every byte; changes nothing.

Not the writer (latents.py), and no judge of pictures: jobs/latents.py decodes some.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mdt_ray import storage
from mdt_ray.data import latents
from mdt_ray.data.latents import LatentFile, Manifest

READ_THREADS = 4
"""Files that are read at the same time; each is in memory whole."""


@dataclass(frozen=True)
class Problem:
    name: str
    """File, below the folder of latents."""
    text: str
    damaged: bool = False
    """Whether its bytes are not those that were written, so that writing it again helps."""


@dataclass(frozen=True)
class _Content:
    ids: list[str]
    counts: Counter[int]


def find_problems(folder: str, manifest: Manifest) -> list[Problem]:
    """Compare every file with the manifest: size, checksum, columns, shapes, finite values; then ids, classes and counts."""
    sizes = storage.list_sizes(folder)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        found = list(pool.map(lambda file: _check_file(folder, manifest, file, sizes), manifest.files))
    problems = [problem for file_problems, _ in found for problem in file_problems]
    contents = [content for _, content in found if content]
    if len(contents) < len(manifest.files):
        return problems
    counts = sum((content.counts for content in contents), Counter())
    expected = dict(enumerate(manifest.class_counts))
    wrong = [c for c in sorted(counts.keys() | expected.keys()) if counts[c] != expected.get(c, 0)]
    if wrong:
        first = wrong[0]
        problems.append(Problem(latents.MANIFEST, f"{len(wrong)} classes have other counts than the files, such as class "
                                                  f"{first}: {expected.get(first, 0)}, in the files {counts[first]}"))
    twice = [image_id for image_id, n in Counter(i for content in contents for i in content.ids).items() if n > 1]
    if twice:
        problems.append(Problem(latents.MANIFEST, f"{len(twice)} ids occur twice, such as {twice[0]!r}"))
    num_rejected = len(latents.read_rejected(folder))
    if latents.REJECTED not in sizes:
        problems.append(Problem(latents.REJECTED, "missing", damaged=True))
    elif num_rejected != manifest.num_rejected:
        problems.append(Problem(latents.REJECTED, f"lists {num_rejected} images, the manifest {manifest.num_rejected}"))
    return problems


def _check_file(folder: str, manifest: Manifest, file: LatentFile,
                sizes: dict[str, int]) -> tuple[list[Problem], _Content | None]:
    if damage := latents.damage_of(file, sizes):
        return [Problem(file.name, damage, damaged=True)], None
    data = storage.read_bytes(storage.join(folder, file.name))
    if storage.sha256(data) != file.sha256:
        return [Problem(file.name, "checksum differs: its bytes have changed", damaged=True)], None
    try:
        table = latents.parse(data)
    except ValueError as error:
        return [Problem(file.name, str(error))], None
    problems = []
    columns = ["moments"] + ["moments_flip"] * manifest.flip
    row_bytes = 2 * int(np.prod(manifest.shape)) * 2
    for name in columns:
        if name not in table.column_names:
            problems.append(Problem(file.name, f"has no column {name}"))
            continue
        lengths = pa.compute.binary_length(table[name]).to_numpy()
        if (lengths != row_bytes).any():
            row = int(np.flatnonzero(lengths != row_bytes)[0])
            problems.append(Problem(file.name, f"row {row} of {name} has {lengths[row]} bytes, must be {row_bytes}"))
            continue
        values = latents.binary_rows(table[name], (2, *manifest.shape)).reshape(table.num_rows, -1)
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            problems.append(Problem(file.name, f"{len(bad)} rows of {name} are not finite, such as "
                                               f"{table['id'][int(bad[0])].as_py()!r}"))
    if table.num_rows != file.num_rows:
        problems.append(Problem(file.name, f"has {table.num_rows} rows, must have {file.num_rows}"))
    if [row for row, s in enumerate(table["split"].to_pylist()) if s == "validation"] != file.validation_rows:
        problems.append(Problem(file.name, "its held-out rows are not those of the manifest"))
    return problems, _Content(table["id"].to_pylist(), Counter(table["label"].to_pylist()))


def describe(folder: str, manifest: Manifest) -> str:
    """What a person wants to know of a folder of latents, from its manifest."""
    num_bytes = sum(f.num_bytes for f in manifest.files)
    held_out = manifest.num_rows - manifest.num_train
    channels, height, width = manifest.shape
    vae, numbers = manifest.vae, manifest.statistics
    rows = [
        ("images", f"{manifest.num_rows:,} in {len(manifest.files)} files, {num_bytes / 1e6:,.1f} MB; {held_out:,} held out "
                   f"for validation; {manifest.num_rejected:,} rejected"),
        ("latent", f"{channels} x {height} x {width}, mean and std in float16, of {manifest.image_size} x "
                   f"{manifest.image_size} pixels, {'with' if manifest.flip else 'without'} mirror images"),
        ("layout", f"schema {manifest.schema_version}, row groups of {manifest.files[0].rows_per_group}, run "
                   f"{manifest.identity}"),
        ("VAE", f"{vae['path']}{'@' + vae['revision'] if vae['revision'] else ''}, weights {vae['weights_hash']}, encoded "
                f"in {manifest.precision}; scale {vae['scale']:g}, shift {vae['shift']:g}"),
    ]
    if numbers:
        scaled = [std * vae["scale"] for std in numbers["std"]]
        rows += [(f"{name} of raw latents", " ".join(f"{x:.4f}" for x in numbers[name])) for name in ("mean", "std")]
        rows.append(("std once scaled", " ".join(f"{x:.4f}" for x in scaled)))
    lines = [folder, *(f"  {name:<20} {text}" for name, text in rows), f"  {'classes':<20} {manifest.num_classes:,}"]
    named = sorted(zip(manifest.class_counts, manifest.class_names, strict=True), key=lambda x: -x[0])
    shown = named if len(named) <= 40 else [*named[:5], (None, f"... ({len(named) - 10:,} more in {latents.MANIFEST})"),
                                            *named[-5:]]
    lines += [f"    {'' if count is None else f'{count:,}':>9}  {name}" for count, name in shown]
    rejected = latents.read_rejected(folder)
    lines += [f"  rejected: {r['id']}: {r['reason']}" for r in rejected[:10]]
    if len(rejected) > 10:
        lines.append(f"  ... and {len(rejected) - 10:,} more in {latents.REJECTED}")
    return "\n".join(lines)
