"""`latents inspect` and `latents verify`: what a folder of latents holds, and whether it is whole. No Ray."""

import math

import numpy as np
import torch

from mdt_ray import config_io, storage
from mdt_ray.config import InspectConfig, PrecomputeConfig, VaeConfig, VerifyConfig
from mdt_ray.data import check, images, latents, listings, readers, sources
from mdt_ray.data.latents import Manifest
from mdt_ray.data.vae import load_vae
from mdt_ray.report import figures

PICTURE = "decoded.png"
COLUMNS = 8
"""Images in a row of the picture."""


def inspect(config: InspectConfig) -> str:
    """Text about the folder. Raises ValueError if it holds no finished latents, with how far they are."""
    folder = storage.absolute(config.folder)
    sizes = storage.list_sizes(folder)
    if listings.PLAN in sizes and latents.MANIFEST not in sizes:
        _, planned, _ = listings.read_parts(storage.join(folder, listings.PLAN), [])
        done = len(storage.list_names(storage.join(folder, "chunks")))
        raise ValueError(f"{folder}: unfinished, {done} of {len(planned)} files are written; the same `mdt-ray precompute` "
                         "goes on")
    manifest = latents.read_manifest(folder)
    damaged = [f"  {file.name}: {damage}; {latents.REBUILD}" for file in manifest.files
               if (damage := latents.damage_of(file, sizes))]
    return "\n".join([check.describe(folder, manifest), *damaged])


def verify(config: VerifyConfig) -> str:
    """Check every file; with `decode`, also decode some latents beside their source images. Returns a line that says so.

    Raises ValueError naming every file that is not as the manifest says. A damaged file is renamed to *.damaged, so that
    nobody trains on it and `precompute` writes it again.
    """
    folder = storage.absolute(config.folder)
    manifest = latents.read_manifest(folder)
    problems = check.find_problems(folder, manifest)
    if problems:
        lines = [f"  {problem.name}: {problem.text}{_set_aside(folder, problem)}" for problem in problems]
        remedy = "run the same `mdt-ray precompute` again, which rebuilds just the damaged files" \
            if any(p.damaged for p in problems) else "delete the folder and run `mdt-ray precompute` again"
        raise ValueError("\n".join([f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}:", *lines, remedy]))
    line = f"{manifest.num_rows:,} latents in {len(manifest.files)} files are whole"
    return f"{line}; {_decode(folder, manifest, config)}" if config.decode else line


def _set_aside(folder: str, problem: check.Problem) -> str:
    uri = storage.join(folder, problem.name)
    if not problem.damaged or not storage.exists(uri):
        return ""
    try:
        storage.move(uri, storage.join(folder, problem.name + ".damaged"))
        return f"; renamed to {problem.name}.damaged"
    except OSError as error:
        return f"; delete it (it could not be renamed: {error})"


def _decode(folder: str, manifest: Manifest, config: VerifyConfig) -> str:
    """Decode the posterior means of images spread over all files, and set them under the source's, in one picture."""
    run = config_io.from_dict(PrecomputeConfig, storage.read_json(storage.join(folder, "run.json"))["config"])
    ids, means = _some_latents(folder, manifest, config.decode)
    originals = _originals(run, config.source or run.source, ids)
    vae = load_vae(VaeConfig(path=manifest.vae["path"], revision=manifest.vae["revision"]))
    if vae.weights_hash != manifest.vae["weights_hash"]:
        raise ValueError(f"vae.path = {manifest.vae['path']!r}: holds other weights ({vae.weights_hash}) than those that "
                         f"made the latents ({manifest.vae['weights_hash']})")
    scaled = (torch.from_numpy(means).float() - vae.shift) * vae.scale  # (n, C, h, w)
    decoded = np.concatenate([vae.decode(part, round_pixels=True).permute(0, 2, 3, 1).numpy() for part in scaled.split(8)])
    psnr = [_psnr(a, b) for a, b in zip(originals, decoded, strict=True)]
    rows, labels = [], []
    for first in range(0, len(ids), COLUMNS):
        rows += [originals[first:first + COLUMNS], decoded[first:first + COLUMNS]]
        labels += ["source", "decoded"]
    uri = storage.join(folder, PICTURE)
    storage.write_bytes(uri, figures.grid(rows, labels, scale=min(2.2, max(0.6, manifest.image_size / 110))))
    worst = int(np.argmin(psnr))
    return f"PSNR of {len(ids)} decoded: mean {np.mean(psnr):.1f} dB, least {psnr[worst]:.1f} dB ({ids[worst]}); {uri}"


def _some_latents(folder: str, manifest: Manifest, count: int) -> tuple[list[str], np.ndarray]:
    """Ids and posterior means (n, C, h, w) of images spread over all files."""
    starts = np.cumsum([0] + [f.num_rows for f in manifest.files])
    places = np.unique(np.linspace(0, manifest.num_rows - 1, min(count, manifest.num_rows)).round().astype(int))
    ids, means = [], []
    for number, file in enumerate(manifest.files):
        rows = places[(places >= starts[number]) & (places < starts[number + 1])] - starts[number]
        for group in np.unique(rows // file.rows_per_group):
            arrays = latents.read_group(folder, file, int(group), manifest.shape, flip=False, with_ids=True)
            for row in rows[rows // file.rows_per_group == group] % file.rows_per_group:
                ids.append(str(arrays["id"][row]))
                means.append(arrays["moments"][row, 0])
    return ids, np.stack(means)


def _originals(run: PrecomputeConfig, source_uri: str, ids: list[str]) -> np.ndarray:
    """The source's crops of some images, (n, H, W, 3) uint8."""
    source = sources.open_source(source_uri, run.labels)
    table = listings.list_images(source).table
    places = {image_id: row for row, image_id in enumerate(table["id"].to_pylist())}
    missing = [i for i in ids if i not in places]
    if missing:
        raise ValueError(f"source = {source_uri!r}: has no image {missing[0]!r}; name by --source where the images lie now")
    pieces = readers.read_pieces(source.folder, source.kind, table.take([places[i] for i in ids]), len(ids))
    found = images.decode_pieces(pieces, run.image_size, run.exif_rotation)
    if found.rejected:
        raise ValueError(f"source = {source_uri!r}: image {found.rejected[0]['id']!r}: {found.rejected[0]['reason']}")
    return found.images


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, in dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
