"""Job `precompute`: images -> VAE posterior -> Parquet, chunk by chunk, restartable by running the same command again.

    source.parquet        the source's files as they were found
    plan.parquet          a row per image; row group k is chunk k
    chunk-k.parquet       the latents of chunk k
    chunks/k.json         what it holds, written after it
    rejected.parquet      the images that could not be read
    manifest.json         written last
"""

import dataclasses
import json
import logging
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mdt_ray import config_io, run_folder, storage, tables
from mdt_ray.config import PrecomputeConfig, VaeConfig
from mdt_ray.data import latents, listings, sources
from mdt_ray.data.latents import LatentFile, Manifest
from mdt_ray.data.listings import PLAN, Listing
from mdt_ray.data.sources import Source
from mdt_ray.data.vae import check_image_size, pin_revision, vae_fingerprint
from mdt_ray.jobs import fanout, progress, session
from mdt_ray.jobs.encode import Encoder, entry_uri

logger = logging.getLogger(__name__)
SOURCE = "source.parquet"
CALLS_PER_ENCODER = 2
"""Chunks in an encoder at a time: one on the device, one that is read ahead or written."""


def precompute(config: PrecomputeConfig) -> Manifest:
    """Encode the source; returns the manifest. Does nothing where it is finished.

    Raises ValueError for a bad source or VAE, for more than max_rejected unreadable images, and if the output holds another
    run or has another writer.
    """
    config, source, run = prepare(config)
    refuse_changes(config.output, source)
    run_folder.check_identity(config.output, run)
    try:
        manifest = latents.open_manifest(config.output)
        if storage.exists(storage.join(config.output, latents.REJECTED)):
            return manifest
    except ValueError:
        pass  # not finished, or damaged: go on below
    plan = storage.join(config.output, PLAN)
    listing = None if storage.exists(plan) else listings.list_images(source)  # before anything is written
    with run_folder.claim(config.output, run) as claim:
        if listing:
            logger.info("%d images of %d classes in %d files", listing.table.num_rows, len(listing.class_names),
                        source.files.num_rows)
            listings.write_parts(plan, listing, cut(listing, source.kind, config.chunk_size))
        if not storage.exists(storage.join(config.output, SOURCE)):
            sources.write_files(storage.join(config.output, SOURCE), source)
        storage.clear_leftovers(storage.join(config.output, "chunks"))
        _, sizes, names = listings.read_parts(plan, [])
        return _encode_missing(config, source, run, claim, sizes, names)


def prepare(config: PrecomputeConfig) -> tuple[PrecomputeConfig, Source, dict]:
    """The config with absolute paths and the VAE's revision pinned, the source, and the content of run.json.

    Raises ValueError for a bad source or VAE, and for an image size that the VAE does not divide.
    """
    paths = {name: storage.absolute(value) for name in ("source", "labels", "output")
             if (value := getattr(config, name)) and value != "digits"}
    config = config_io.override(config, paths)
    source_folder, output = (storage.base(uri).rstrip("/") + "/" for uri in (config.source, config.output))
    if output.startswith(source_folder):
        raise ValueError(f"output = {config.output!r}: lies in the source, {config.source!r}, which it would change; put it "
                         "elsewhere")
    source = sources.open_source(config.source, config.labels)
    vae = pin_revision(_begun_with(config) or config.vae)
    check_image_size(vae, config.image_size)
    config = dataclasses.replace(config, vae=vae)
    run = run_folder.describe("precompute", config, {
        "source": source.fingerprint, "vae": vae_fingerprint(vae), "schema_version": latents.SCHEMA_VERSION})
    return config, source, run


def _begun_with(config: PrecomputeConfig) -> VaeConfig | None:
    """The autoencoder that a run here pinned, where the settings name no revision: the hub may have a newer one since."""
    uri = storage.join(config.output, "run.json")
    if config.vae.revision or not storage.exists(uri):
        return None
    held = storage.read_json(uri)["config"].get("vae", {})
    return VaeConfig(**held) if held.get("path") == config.vae.path else None


def refuse_changes(output: str, source: Source) -> None:
    """Raise ValueError naming the files of the source that changed since a run here began."""
    try:
        begun = tables.read(storage.join(output, SOURCE))
    except FileNotFoundError:
        return
    lines = sources.changes(begun, source)
    if lines:
        more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise ValueError(f"{output}: the source has changed since this run began:\n  " + "\n  ".join(lines[:10]) + more +
                         "\nUse another output folder, or put the source back. If only the files' times changed, delete "
                         f"{SOURCE} there.")


def cut(listing: Listing, kind: str, chunk_size: int) -> list[np.ndarray]:
    """Rows of the listing in each chunk: equal parts of at most chunk_size.

    Pictures are shuffled, so that each file of latents has all classes; Parquet and tars are read in their own order.
    """
    count = listing.table.num_rows
    order = listings.shuffled(count) if kind == "pictures" else np.arange(count)
    return np.array_split(order, math.ceil(count / chunk_size))


def _encode_missing(config: PrecomputeConfig, source: Source, run: dict, claim: run_folder.Claim, sizes: list[int],
                    names: list[str]) -> Manifest:
    started = time.perf_counter()
    entries = finished_entries(config.output, run["name"], len(sizes))
    seconds: Counter[str] = Counter()
    missing = [chunk for chunk in range(len(sizes)) if chunk not in entries]
    if entries:
        logger.info("%d of %d files are there already", len(entries), len(sizes))
    if missing:
        session.start()
        session.require_spare_cpu(config.workers)
        _refuse_rejected(config, entries, sum(sizes))
    with progress.bar(sum(sizes), "image", "precompute", initial=sum(sizes[k] for k in entries)) as bar:
        if missing:
            with progress.watched(progress.Parts(bar, sizes, entries).show) as mailbox:
                arguments = (config_io.to_dict(config), source.folder, source.kind, run["name"], claim, mailbox)
                for row in fanout.run_chunks([{"chunk": k} for k in missing], Encoder, arguments, config.workers,
                                             calls_per_worker=CALLS_PER_ENCODER):
                    entries[row["chunk"]] = json.loads(row["entry"])
                    seconds.update(json.loads(row["seconds"]))
                    _refuse_rejected(config, entries, sum(sizes))
    manifest = _manifest(config, run, [entries[k] for k in range(len(sizes))], names)
    latents.write_rejected(config.output, [r for k in range(len(sizes)) for r in entries[k]["rejected"]])
    latents.write_manifest(config.output, manifest)
    _summarise(manifest, sum(sizes[k] for k in missing), time.perf_counter() - started, seconds)
    return latents.open_manifest(config.output)


def finished_entries(output: str, run_name: str, count: int) -> dict[int, dict]:
    """What each finished chunk holds; those of another run, or whose file is missing or of another size, are left out."""
    sizes = storage.list_sizes(output)
    written = {int(name.removesuffix(".json")) for name in storage.list_names(storage.join(output, "chunks"))
               if name.removesuffix(".json").isdecimal()}

    def read(chunk: int) -> dict | None:
        try:
            entry = storage.read_json(entry_uri(output, chunk))
            return entry if entry["run"] == run_name and not latents.damage_of(LatentFile(**entry["file"]), sizes) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing, damaged, of another version
            return None

    with ThreadPoolExecutor(16) as pool:
        chunks = sorted(written & set(range(count)))
        return {chunk: entry for chunk, entry in zip(chunks, pool.map(read, chunks), strict=True) if entry}


def _refuse_rejected(config: PrecomputeConfig, entries: dict[int, dict], count: int) -> None:
    rejected = [r for entry in entries.values() for r in entry["rejected"]]
    if len(rejected) > config.max_rejected * count:
        latents.write_rejected(config.output, rejected)
        raise ValueError(f"source = {config.source!r}: {len(rejected)} of {count} images are unreadable so far, such as "
                         f"{rejected[0]['id']!r} ({rejected[0]['reason']}): more than max_rejected = "
                         f"{config.max_rejected}. {storage.join(config.output, latents.REJECTED)} lists them; raise "
                         "--max-rejected to go on without them, or mend them and use a new output folder")


def _manifest(config: PrecomputeConfig, run: dict, entries: list[dict], names: list[str]) -> Manifest:
    counts: Counter[int] = Counter()
    for entry in entries:
        counts.update({int(label): n for label, n in entry["class_counts"].items()})
    if not counts:
        raise ValueError(f"source = {config.source!r}: no readable image; see {storage.join(config.output, 'chunks')}")
    hashes = {entry["vae"]["weights_hash"] for entry in entries}
    if len(hashes) > 1:
        raise ValueError(f"vae.path = {config.vae.path!r}: the nodes hold different weights there; copy the same to all, "
                         f"delete {config.output} and start again")
    first = entries[0]
    return Manifest(identity=run["name"], shape=first["shape"], image_size=config.image_size, vae=first["vae"],
                    precision=config.precision, num_classes=len(names), class_counts=[counts[c] for c in range(len(names))],
                    class_names=names, flip=config.flip, num_rejected=sum(len(e["rejected"]) for e in entries),
                    statistics=latents.statistics([e["sums"] for e in entries]),
                    files=[LatentFile(**e["file"]) for e in entries if e["file"]["num_rows"]])


def _summarise(manifest: Manifest, num_images: int, elapsed: float, seconds: Counter[str]) -> None:
    logger.info("%d latents in %d files, %.1f MB; %d images rejected", manifest.num_rows, len(manifest.files),
                sum(f.num_bytes for f in manifest.files) / 1e6, manifest.num_rejected)
    logger.info("latents per channel: mean %s, std %s", *(" ".join(f"{x:.3f}" for x in manifest.statistics[name])
                                                           for name in ("mean", "std")))
    work = {name: seconds[name] for name in ("reading", "decoding", "encoding", "writing")}
    if sum(work.values()):
        shares = ", ".join(f"{name} {value / sum(work.values()):.0%}" for name, value in work.items())
        idle = seconds["waiting"] / (seconds["waiting"] + seconds["encoding"])
        logger.info("%.1f images/s in %.1f s; work: %s; encoders waited %.0f%% of their time", num_images / elapsed, elapsed,
                    shares, 100 * idle)
