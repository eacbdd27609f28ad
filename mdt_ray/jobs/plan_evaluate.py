"""`plan evaluate`: how long an evaluation takes, measured on a few images and steps here.

In this process, no Ray; nothing is written.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import torch

from mdt_ray.autocast import autocast_dtype
from mdt_ray.config import EvaluateConfig, SamplingConfig
from mdt_ray.diffusion.sampling import make_scheduler, ready
from mdt_ray.evaluation import chunks, extractors
from mdt_ray.inference.sampler import draw_latents, labels_of, load_decoder, load_networks
from mdt_ray.jobs.evaluate import Plan, plan
from mdt_ray.jobs.units import duration, rate, size

FEW_STEPS = 4
"""Of a sampler, that are timed."""
MEASURE_SECONDS = 5.0
"""Spent on each part, or one call if that takes longer."""


def plan_evaluate(config: EvaluateConfig) -> str:
    """Text: counts, sizes, rates, hours. Raises ValueError as `evaluate` does for what is missing."""
    p = plan(config)
    config = p.config
    count = config.num_samples * config.num_seed_ranges
    num_chunks = math.ceil(config.num_samples / config.chunk_size) * config.num_seed_ranges
    ranges = f" in {config.num_seed_ranges} ranges of seeds" if config.num_seed_ranges > 1 else ""
    lines = [f"samples     {count:,} images{ranges}, {num_chunks:,} chunks"]
    if p.reference:
        lines.append(f"reference   {p.reference.num_images:,} images to measure" +
                     (", and given statistics" if p.statistics else ""))
    else:
        lines.append("reference   given statistics; without pictures: no precision, recall and KID")
    device = torch.device("cuda" if config.workers.gpus_per_worker else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        return "\n".join([*lines, "time        not measured: this machine has no GPU; run the same on a node that has one"])
    torch.set_num_threads(max(1, int(config.workers.cpus_per_worker)))
    features, row_bytes = _features(p, device)
    per_image = {"measuring": features}
    if not p.samples:
        per_image = _drawing(p, device) | per_image
    lines.append(f"disk        {size(count * row_bytes)} of features")
    lines.append("measured    " + ", ".join(f"{name} {rate(1 / s)} images/s" for name, s in per_image.items()) +
                 f" ({device.type}, {config.precision}, a worker)")
    slowest = sum(per_image.values()) if device.type == "cuda" else max(per_image.values())
    total = (count * slowest + (p.reference.num_images * features if p.reference else 0)) / config.workers.num_workers
    lines.append(f"time        about {duration(total)} and some 20 s to start, with {config.workers.num_workers} workers")
    return "\n".join(lines)


def _drawing(p: Plan, device: torch.device) -> dict[str, float]:
    """Seconds that an image takes to draw and to decode."""
    config, sampling = p.config, p.config.sampling
    networks = load_networks(config.checkpoint, sampling, device, autocast_dtype(config.precision, device), config.compile)
    vae = load_decoder(p.facts, device)
    labels = labels_of(0, config.sample_batch_size, networks.num_classes, config.labels, config.seed)
    inside = _share_inside(sampling)
    step = 0.0
    unguided = {"cfg_scale": 1.0, "guide": "", "cfg_interval": None}
    for share, changes in ((inside, {"cfg_interval": None}), (1 - inside, unguided)):
        if share:
            few = dataclasses.replace(sampling, num_sampling_steps=min(FEW_STEPS, sampling.num_sampling_steps), **changes)
            step += share * _seconds(lambda few=few: draw_latents(networks, few, 0, labels, config.seed).cpu()) / \
                few.num_sampling_steps
    latents = torch.randn(len(labels), *p.facts["latent_shape"], device=device)
    return {"drawing": step * sampling.num_sampling_steps / len(labels),
            "decoding": _seconds(lambda: vae.decode(latents).cpu()) / len(labels)}


def _share_inside(sampling: SamplingConfig) -> float:
    """Share of the steps that are guided."""
    if sampling.cfg_scale == 1:
        return 0.0
    if sampling.cfg_interval is None:
        return 1.0
    timesteps = ready(make_scheduler(sampling.sampler), sampling.num_sampling_steps).timesteps
    low, high = sampling.cfg_interval
    return float(((timesteps >= low) & (timesteps <= high)).float().mean())


def _features(p: Plan, device: torch.device) -> tuple[float, int]:
    """Seconds that an image takes to measure, and bytes of its features."""
    config = p.config
    extractor = extractors.load_extractor(config.extractor, config.extractor_weights, device)
    side = p.facts["image_size"] if p.facts else p.samples.image_size
    images = torch.randint(256, (min(chunks.BATCH_SIZE, config.chunk_size), 3, side, side), dtype=torch.uint8)
    found = extractor(images)
    width = sum(x.shape[1] for x in (found.pool, found.spatial, found.logits) if x is not None)
    return _seconds(lambda: extractor(images).pool.cpu()) / len(images), 4 * width


def _seconds(call: Callable[[], object]) -> float:
    """Of a call, after one to warm up; the mean of as many as MEASURE_SECONDS hold."""
    started = time.perf_counter()
    call()
    warm_up = time.perf_counter() - started
    seconds = [warm_up] if warm_up > MEASURE_SECONDS else []
    while sum(seconds) < MEASURE_SECONDS:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return sum(seconds) / len(seconds)
