"""Speed of guided sampling, without decoding: ours in bf16 with compiled blocks against the published way in eager fp32.

    python benchmarks/sampling.py [--quick]
    python benchmarks/sampling.py --preset imagenet256-xl-2 --device cuda     images/s by batch size, hours for 50,000 images
    python benchmarks/sampling.py --checkpoint runs/digits/train              grey levels between bf16 and fp32

The first is for CPUs: the digits model (16 tokens) and MDT-S/2 (256), in turns in one process of one thread, medians of the
processor's time, which counts neighbours least. All have the same weights, and in fp32 the latents must agree for the same
noise. The other two do not measure the published way.
"""

import argparse
import dataclasses
import functools
import gc
import json
import platform
import time

import torch
from forward import medians
from published_sampling import NUM_GUIDED_CHANNELS, PublishedSampler

from mdt_ray import checkpoints, storage
from mdt_ray.config import SamplingConfig
from mdt_ray.inference.sampler import Networks, Sampler, draw_latents, labels_of, prepare
from mdt_ray.models import MDT
from mdt_ray.presets import preset
from mdt_ray.training.step import build_model

MODELS = {"digits": ("digits", 100, 10), "s_2": ("imagenet256-s-2", 4, 3)}
"""Of a figure: preset, images at once and steps of a call. A step costs the same however many there are."""
QUICK = {"digits": ("digits", 100, 5), "s_2": ("imagenet256-s-2", 2, 2)}
KINDS = {"fp32": (None, True), "fp32 eager": (None, False),
         "bf16": (torch.bfloat16, True), "bf16 eager": (torch.bfloat16, False)}
"""Ours: autocast's dtype, and whether blocks are compiled."""
FIGURES = {"bf16": "sampling_speedup_vs_eager_fp32", "fp32": "sampling_speedup_fp32_vs_eager_fp32",
           "bf16 eager": "sampling_speedup_without_compile", "fp32 eager": "sampling_speedup_fp32_without_compile"}
AGREEMENT = 1e-3
"""Allowed difference of our fp32 latents from the published way's, over the greatest of them."""
PAPER_STEPS, PAPER_IMAGES = 250, 50_000


def settings(num_steps: int) -> SamplingConfig:
    """Ancestral sampling, guided, as the paper's (appendix D)."""
    return SamplingConfig(num_sampling_steps=num_steps, cfg_scale=3.8, cfg_power=4.0, cfg_channels=NUM_GUIDED_CHANNELS)


def build(name: str, device: torch.device) -> MDT:
    """The model of a preset with random weights, the same in every call."""
    torch.manual_seed(0)
    config = preset(name).train.model
    given = {"input_size": config.input_size or 32, "in_channels": config.in_channels or 4}  # (else the latents say it)
    model = build_model(dataclasses.replace(config, **given)).to(device).eval().requires_grad_(False)
    for parameter in model.parameters():  # (a fresh one gives zeros)
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def networks(name: str, device: torch.device, dtype: torch.dtype | None, compiled: bool) -> Networks:
    """As they come from a checkpoint."""
    model = prepare(build(name, device), dtype, compiled)
    shape = [model.config.in_channels, *[model.config.input_size] * 2]
    return Networks(model, None, {"num_classes": model.config.num_classes, "latent_shape": shape}, device, dtype)


def measure(quick: bool = False) -> dict[str, float]:
    """Speed-ups over the published way for both models, one thread of the CPU; `sampling_speedup_vs_eager_fp32` is the
    smaller one of bf16 with compiled blocks."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for name, (preset_name, batch_size, num_steps) in (QUICK if quick else MODELS).items():
        seconds = measure_one(preset_name, batch_size, num_steps, 3 if quick else 9)
        print(f"{preset_name}, {batch_size} images at once")
        print("\n".join(f"  {kind:<12} {value / num_steps * 1e3:8.1f} ms a step" for kind, value in seconds.items()))
        for kind, title in FIGURES.items():
            figures[f"{title}_{name}"] = seconds["published"] / seconds[kind]
    torch.set_num_threads(num_threads)
    figures[FIGURES["bf16"]] = min(figures[f"{FIGURES['bf16']}_{name}"] for name in MODELS)
    return figures


def measure_one(name: str, batch_size: int, num_steps: int, rounds: int) -> dict[str, float]:
    """Seconds of a call of the published way and of each of KINDS."""
    torch._dynamo.reset()
    device, config = torch.device("cpu"), settings(num_steps)
    baseline = PublishedSampler(build(name, device), num_steps, config.cfg_scale, config.cfg_power)
    y = labels_of(0, batch_size, baseline.null_label, "random", seed=0)
    found = {kind: networks(name, device, *how) for kind, how in KINDS.items()}
    noise, draw = same_noise(batch_size, found["fp32"].facts["latent_shape"])
    expected = baseline(noise, y, draw)
    for kind in ("fp32", "fp32 eager"):
        difference = (draw_latents(found[kind], config, 0, y, 0) - expected).abs().max() / expected.abs().max()
        assert difference < AGREEMENT, (name, kind, difference)
    functions = {"published": lambda: baseline(noise, y)}
    functions |= {kind: lambda its=its: draw_latents(its, config, 0, y, 0) for kind, its in found.items()}
    return medians(functions, rounds, lambda: None, time.process_time)


def same_noise(batch_size: int, shape: list[int]):
    """The start (B, C, h, w) of `draw_latents` for seed 0, and a function that gives the noise of its steps, twice."""
    generators = [torch.Generator().manual_seed(2 * i) for i in range(batch_size)]

    def draw(x: torch.Tensor | None = None) -> torch.Tensor:
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return noise if x is None else torch.cat([noise, noise])

    return draw(), draw


def sweep(name: str, device: torch.device, batch_sizes: list[int], num_steps: int) -> dict[str, float]:
    """Images/s in bf16 with compiled blocks at 250 steps, and hours for 50,000 images, by batch size until memory ends."""
    figures = {}
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for batch_size in batch_sizes:
        gc.collect()  # (compiled modules hold each other)
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        try:
            ours = networks(name, device, torch.bfloat16, True)
            y = labels_of(0, batch_size, ours.num_classes, "random", seed=0)
            draw = functools.partial(draw_latents, ours, settings(num_steps), 0, y, 0)
            seconds = medians({"draw": draw}, 5, synchronise)["draw"]
        except RuntimeError as error:  # out of memory, as torch, cuBLAS or the compiler call it
            print(f"  batch {batch_size:4}  {str(error).splitlines()[0][:90]}", flush=True)
            break
        rate = batch_size / (seconds / num_steps * PAPER_STEPS)
        hours = PAPER_IMAGES / rate / 3600
        print(f"  batch {batch_size:4}  {rate:8.2f} images/s, guided, {PAPER_STEPS} steps; {PAPER_IMAGES:,}: {hours:7.2f} h",
              flush=True)
        figures |= {f"images_per_second_{batch_size}": rate, f"hours_for_50k_{batch_size}": hours}
    return figures


def difference(checkpoint: str, device: torch.device) -> dict[str, float]:
    """Grey levels between images of a checkpoint in bf16 with compiled blocks and in eager fp32: 100 at 25 DPM-Solver++
    steps, guided at 3."""
    checkpoint = checkpoints.resolve(storage.absolute(checkpoint))
    config = SamplingConfig(sampler="dpm-solver++", num_sampling_steps=25, cfg_scale=3.0)
    images = []
    for dtype, compiled in ((None, False), (torch.bfloat16, True)):
        sampler = Sampler(checkpoint, config, device, dtype, compiled)
        labels = labels_of(0, 100, sampler.num_classes, "random", seed=0)
        images.append(sampler.draw(0, labels, seed=0).float())  # (100, 3, H, W)
    levels = (images[1] - images[0]).abs()
    return {"grey_levels_mean": levels.mean().item(), "grey_levels_largest": levels.max().item(),
            "grey_levels_of_images_mean": (images[0][1:] - images[0][:-1]).abs().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps, within a minute on 2 cores")
    parser.add_argument("--preset", help="images/s of this preset's model instead")
    parser.add_argument("--checkpoint", help="bf16 against fp32 of this checkpoint instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the latter two")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16, 32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=10, help="measured, with --preset")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.preset:
        figures = sweep(arguments.preset, device, arguments.batch_sizes, arguments.steps)
    elif arguments.checkpoint:
        figures = difference(arguments.checkpoint, device)
    else:
        device, figures = torch.device("cpu"), measure(arguments.quick)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(json.dumps({"name": "sampling", "machine": machine, "figures": {k: round(v, 3) for k, v in figures.items()}}))


if __name__ == "__main__":
    main()
