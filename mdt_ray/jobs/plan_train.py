"""`plan`: what a training run would take of GPUs, time and disk, and whether it fits.

Counted on the real model (training/cost.py), in this process, without Ray; nothing is written. What is assumed is called so.
"""

import dataclasses
import math
from typing import NamedTuple

import torch

from mdt_ray import checkpoints, config_io, storage
from mdt_ray.autocast import autocast_dtype
from mdt_ray.config import PlanConfig
from mdt_ray.data import latents
from mdt_ray.data.latents import Manifest
from mdt_ray.jobs import units
from mdt_ray.jobs.units import duration, scaled, size
from mdt_ray.training import cost as costs
from mdt_ray.training.contract import resolve_model
from mdt_ray.training.cost import Cost

ASSUMED = {"input_size": 32, "in_channels": 4, "num_classes": 1000}
"""The latent of ImageNet at 256 pixels (paper section 5.1), where neither settings nor latents say."""
TIGHT = 0.9
"""Share of the GPU's memory from which on the plan warns: temporaries, fragments and NCCL's buffers are not counted."""


class Gpu(NamedTuple):
    """Of the vendor's data sheet."""

    memory: float
    """Bytes, a GB read as 1e9; the device reports some percent more, which its context takes."""
    peak: dict[str, float]
    """Operations per second without sparsity, by precision."""


GPUS = {
    # NVIDIA A100 Tensor Core GPU data sheet (nvidia-1758950-r4): SXM.
    "a100-40gb": Gpu(40e9, {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}),
    "a100-80gb": Gpu(80e9, {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}),
    # NVIDIA H100 and H200 Tensor Core GPU data sheets: SXM, half of the numbers given "with sparsity".
    "h100": Gpu(80e9, {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}),
    "h200": Gpu(141e9, {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}),
}


def plan_train(config: PlanConfig) -> str:
    """Text: parameters, operations, memory, latents, steps, time, checkpoints.

    Raises ValueError for latents that are damaged or do not fit the model, and where a GPU has too little memory.
    """
    config, manifest = with_model(config)
    cost = _cost(config)
    check_memory(config, cost)
    return "\n".join(f"{name:<12}{text}" for name, text in {
        "model": _model(config, cost), "operations": _operations(config, cost), "memory": _memory(config, cost),
        "latents": _latents(config, manifest), "steps": _steps(config, manifest), "time": _time(config, cost),
        "checkpoints": _checkpoints(config, cost) + _snapshots(config, cost)}.items())


def with_model(config: PlanConfig) -> tuple[PlanConfig, Manifest | None]:
    """The config with a complete model, and the latents' manifest where there is one."""
    found = bool(config.latents) and storage.exists(storage.join(config.latents, latents.MANIFEST))
    manifest = latents.open_manifest(config.latents) if found else None
    if manifest:
        return dataclasses.replace(config, model=resolve_model(config.model, manifest)), manifest
    missing = {name: value for name, value in ASSUMED.items() if getattr(config.model, name) is None}
    return dataclasses.replace(config, model=config_io.override(config.model, missing, where="model")), None


def check_memory(config: PlanConfig, cost: Cost) -> None:
    """Raise ValueError unless what a GPU has to hold is at most its memory."""
    if not config.workers.gpus_per_worker:
        return
    have = GPUS[config.gpu].memory
    if _needed(config, cost) > have:
        raise ValueError(
            f"workers.num_workers = {config.workers.num_workers}: {_sharing(config) * _at_once(config)} images at once on a "
            f"GPU need {_parts(config, cost)}, and the memory of gpu = {config.gpu!r} is {size(have)}; give " +
            (" or ".join(_remedies(config, cost)) or "a smaller batch_size or model, or more num_lanes and as many workers"))


def _remedies(config: PlanConfig, cost: Cost) -> list[str]:
    """Single settings with which a GPU's memory suffices."""
    needed, have = _needed(config, cost), GPUS[config.gpu].memory
    workers, remedies = config.workers.num_workers, []
    for flag, name, now, most in (
            ("--accumulation", "accumulation", config.accumulation, config.num_lanes // workers),
            ("--workers.num-workers", "workers.num_workers", workers, config.num_lanes // config.accumulation)):
        changed = (config_io.override(config, {name: value}) for value in range(now + 1, most + 1))
        enough = next((c for c in changed if _needed(c, cost) <= have), None)
        if enough:
            remedies.append(f"{flag} {config_io.flatten(config_io.to_dict(enough))[name]}")
    if not config.gradient_checkpointing:
        less = dataclasses.replace(config, gradient_checkpointing=True)
        if _needed(less, _cost(less)) <= have:
            remedies.append("--gradient-checkpointing")
    if _precision(config) != "bf16":
        half = dataclasses.replace(config, precision="bf16")
        if _needed(half, _cost(half)) <= have:
            remedies.append("--precision bf16")
    return remedies + [f"--gpu {name}" for name, gpu in GPUS.items() if needed <= gpu.memory]


def _cost(config: PlanConfig) -> Cost:
    return costs.count(config, torch.bfloat16 if _precision(config) == "bf16" else None,
                       on_gpu=config.workers.gpus_per_worker > 0)


def _precision(config: PlanConfig) -> str:
    """`auto` resolved: all of GPUS have bf16."""
    if config.precision != "auto":
        return config.precision
    on_cpu = not config.workers.gpus_per_worker
    return "fp32" if on_cpu and autocast_dtype("auto", torch.device("cpu")) is None else "bf16"


def _sharing(config: PlanConfig) -> int:
    """Workers on one GPU."""
    return max(1, int(1 / config.workers.gpus_per_worker)) if 0 < config.workers.gpus_per_worker < 1 else 1


def _lanes(config: PlanConfig) -> int:
    """Lanes of the worker that has most."""
    return math.ceil(config.num_lanes / config.workers.num_workers)


def _at_once(config: PlanConfig) -> int:
    """Images of the largest micro-batch of a worker."""
    return math.ceil(_lanes(config) / config.accumulation) * config.batch_size // config.num_lanes


def _memory_of_worker(config: PlanConfig, cost: Cost) -> dict[str, int]:
    return cost.memory(_at_once(config))


def _needed(config: PlanConfig, cost: Cost) -> int:
    return _sharing(config) * sum(_memory_of_worker(config, cost).values())


def _parts(config: PlanConfig, cost: Cost) -> str:
    parts = _memory_of_worker(config, cost)
    text = ", ".join(f"{name} {size(value * _sharing(config))}" for name, value in parts.items())
    return f"{size(_needed(config, cost))} ({text})"


def _model(config: PlanConfig, cost: Cost) -> str:
    m = config.model
    return (f"{m.kind}, {m.depth} blocks of width {m.hidden_size}, {(m.input_size // m.patch_size) ** 2} tokens: "
            f"{cost.num_parameters:,} parameters, {cost.num_inference_parameters:,} at inference")


def _operations(config: PlanConfig, cost: Cost) -> str:
    loss = config.loss
    passes = "full" if config.model.kind == "dit" else loss.passes
    ratio = f", mask ratio {loss.mask_ratio + loss.mask_ratio_span / 2:g}" if passes != "full" else ""
    return (f"{scaled(cost.inference_flops / 2, 'MAC')} a pass over an image at inference; training takes "
            f"{scaled(cost.training_flops, 'FLOP')} an image ({passes.replace('+', ' and ')}, forward and backward{ratio})")


def _memory(config: PlanConfig, cost: Cost) -> str:
    dtype = _precision(config)
    if not config.workers.gpus_per_worker:
        return f"{_parts(config, cost)} a worker, for {_at_once(config)} images at once in {dtype}"
    have = GPUS[config.gpu].memory
    attention = ("fused attention" if cost.fused_attention
                 else "attention keeps its L x L matrix: PyTorch's fused kernels do not take this bias")
    tight = "; TIGHT: temporaries are not counted" if _needed(config, cost) > TIGHT * have else ""
    return (f"{_parts(config, cost)} of the {size(have)} of gpu = {config.gpu}, for {_sharing(config) * _at_once(config)} "
            f"images at once in {dtype} ({attention}{tight})")


def _latents(config: PlanConfig, manifest: Manifest | None) -> str:
    if manifest:
        num_bytes = sum(file.num_bytes for file in manifest.files)
        return f"{size(num_bytes)}, {sum(f.num_rows for f in manifest.files):,} images in {len(manifest.files):,} files"
    m = config.model
    num_bytes = config.num_images * latents.row_bytes((m.in_channels, m.input_size, m.input_size), config.flip)
    return (f"none yet; assumed {config.num_images:,} images, latents {m.in_channels} x {m.input_size} x {m.input_size} "
            f"{'with' if config.flip else 'without'} mirror images: {size(num_bytes)}")


def _steps(config: PlanConfig, manifest: Manifest | None) -> str:
    images = config.num_steps * config.batch_size
    epochs = images / (manifest.num_train if manifest else config.num_images)
    uneven = (f"; {config.num_lanes} lanes do not divide over {config.workers.num_workers} workers: all wait for those with "
              f"{_lanes(config)}" if config.num_lanes % config.workers.num_workers else "")
    return f"{config.num_steps:,} of {config.batch_size:,} images: {epochs:,.1f} epochs{uneven}"


def _time(config: PlanConfig, cost: Cost) -> str:
    workers, rate = config.workers, config.images_per_second
    gpus = workers.num_workers * workers.gpus_per_worker
    if rate:
        source = "measured, as given"
    elif not gpus:
        return "not estimated for CPUs; measure some steps and give --images-per-second"
    else:
        peak = GPUS[config.gpu].peak[_precision(config)]
        # The worker with most lanes sets the pace.
        slowest = _sharing(config) * _lanes(config) * config.batch_size / config.num_lanes
        rate = config.batch_size * config.mfu * peak / (cost.training_flops * slowest)
        source = f"assumed: {config.mfu:.0%} of {peak / 1e12:g} TFLOP/s; measure some steps and give --images-per-second"
    seconds = config.num_steps * config.batch_size / rate
    of_gpus = f" on {gpus:g} GPUs, {seconds * gpus / 3600:,.0f} GPU hours" if gpus else ""
    return f"{duration(seconds)}{of_gpus} at {units.rate(rate)} images/s ({source})"


def _checkpoints(config: PlanConfig, cost: Cost) -> str:
    steps = sorted({*range(0, config.num_steps, config.checkpoint_every_steps), config.num_steps})
    kept, each = len(checkpoints.kept(steps, config.keep_last, config.keep_every_steps)), cost.checkpoint_bytes
    return (f"{size(each)} each, {kept:,} of {len(steps):,} kept: {size(kept * each)}; one more, and as much host memory, "
            "while it is written")


def _snapshots(config: PlanConfig, cost: Cost) -> str:
    if not config.ema.power_stds:
        return ""
    count = math.ceil(config.num_steps / config.ema.snapshot_every_steps)
    return f"; {count:,} snapshots of averages, all kept: {size(count * cost.snapshot_bytes)}"
