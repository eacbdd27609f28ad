"""`plan precompute`: how large the latents of a source will be and about how long they take, measured on a few images here.

In this process, no Ray; nothing is written.
"""

import math
import time

import numpy as np
import torch

from mdt_ray.autocast import autocast_dtype
from mdt_ray.config import PrecomputeConfig
from mdt_ray.data import latents, listings, readers, sources
from mdt_ray.data.images import Pixels, decode_pieces
from mdt_ray.data.vae import downscaling, load_vae, to_unit_range, vae_config
from mdt_ray.jobs.precompute import prepare
from mdt_ray.jobs.units import duration, size

SAMPLE_IMAGES = 128
ENCODE_SECONDS = 10.0
"""Spent on measuring the encoder, or one batch if that takes longer."""


def plan_precompute(config: PrecomputeConfig) -> str:
    """Text: counts, sizes, rates, time. Raises ValueError as `precompute` does for a bad source or VAE."""
    config, source, _ = prepare(config)
    listing = listings.list_images(source)
    count = listing.table.num_rows
    settings = vae_config(config.vae)
    side = config.image_size // downscaling(settings)
    row_bytes = latents.row_bytes((settings["latent_channels"], side, side), config.flip)
    sample = _sample(config, source, listing)
    device = "cuda" if config.workers.gpus_per_worker else "cpu"
    encoding = _encoding_rate(config, sample, device) if device == "cpu" or torch.cuda.is_available() else None
    num_read = len(sample.ids) + len(sample.rejected)
    decoding = num_read / sample.decode_seconds
    workers = config.workers.num_workers
    lines = [
        f"source      {count:,} images of {len(listing.class_names):,} classes in {source.files.num_rows:,} files "
        f"({source.kind}, {size(sum(source.files['size'].to_pylist()))})",
        f"latents     {math.ceil(count / config.chunk_size):,} files, {size(count * row_bytes)} "
        f"({settings['latent_channels']} x {side} x {side} of {config.image_size} x {config.image_size} pixels, "
        f"{'with' if config.flip else 'without'} mirror images)",
        f"measured    on {num_read} images here: reading {num_read / sample.read_seconds:,.0f} images/s, decoding "
        f"{decoding:,.0f} images/s a CPU",
    ]
    if sample.rejected:
        share = len(sample.rejected) / num_read
        first = sample.rejected[0]
        lines.append(f"unreadable  {len(sample.rejected)} of {num_read} ({share:.1%}), such as {first['id']!r}: "
                     f"{first['reason']}" + (f"; more than --max-rejected {config.max_rejected} stops the job"
                                             if share > config.max_rejected else ""))
    if encoding is None:
        lines.append("encoding    not measured: this machine has no GPU; run the same on a node that has one")
        return "\n".join(lines)
    decoders = math.ceil(encoding / decoding)
    rate = workers * min(encoding, config.decoders_per_worker * decoding)
    lines += [
        f"encoding    {encoding:,.1f} images/s a worker ({device}, {config.precision}); decoders that keep it busy: "
        f"{decoders}",
        f"time        about {duration(count / rate)} and some 20 s to start, with {workers} workers and "
        f"{config.decoders_per_worker} decoders each",
    ]
    if decoders > config.decoders_per_worker:
        lines.append(f"            decoding is the limit: --decoders-per-worker {decoders}, if the cluster has as many CPUs")
    return "\n".join(lines)


def _sample(config: PrecomputeConfig, source: sources.Source, listing: listings.Listing) -> Pixels:
    """Some images spread over the source, decoded."""
    places = np.linspace(0, listing.table.num_rows - 1, min(SAMPLE_IMAGES, listing.table.num_rows)).round().astype(int)
    pieces = readers.read_pieces(source.folder, source.kind, listing.table.take(np.unique(places)), SAMPLE_IMAGES)
    return decode_pieces(pieces, config.image_size, config.exif_rotation)


def _encoding_rate(config: PrecomputeConfig, sample: Pixels, device: str) -> float:
    """images/s of the VAE in batches of the job's size, mirror images included."""
    if not len(sample.images):
        raise ValueError(f"source = {config.source!r}: none of {len(sample.rejected)} images is readable, such as "
                         f"{sample.rejected[0]['id']!r}: {sample.rejected[0]['reason']}")
    torch.set_num_threads(max(1, int(config.workers.cpus_per_worker)))
    vae = load_vae(config.vae, device)
    batch = np.resize(sample.images, (config.encode_batch_size, *sample.images.shape[1:]))
    x = to_unit_range(torch.from_numpy(batch).to(device))
    dtype = autocast_dtype(config.precision, torch.device(device))

    def encode() -> float:
        started = time.perf_counter()
        vae.encode(x, dtype).cpu()
        return time.perf_counter() - started

    warm_up = encode()
    seconds = [warm_up] if warm_up > ENCODE_SECONDS else []
    while sum(seconds) < ENCODE_SECONDS:
        seconds.append(encode())
    return len(x) * len(seconds) / sum(seconds) / (2 if config.flip else 1)
