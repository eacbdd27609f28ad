"""Time of a forward pass of MDT-S/2 at batch 8: full against diffusers' DiT of that size, and masked against full.

    python benchmarks/forward.py [--quick]

Without gradients, in turns in one process, medians. Ours carries relative position biases; diffusers' DiT does not, but
embeds the timestep anew in every block.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel

from mdt_ray.models import MDT, sample_mask

BATCH, MASK_RATIO = 8, 0.3


def medians(functions: dict[str, Callable], rounds: int, synchronise: Callable,
            clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds of each function, called in turn; the first two rounds warm up."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            start = clock()
            function()
            synchronise()
            times[name].append(clock() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under a minute on 2 cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.manual_seed(0)
    mdt = MDT().eval().to(device)
    dit = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12,
                                num_embeds_ada_norm=1000).eval().to(device)
    x = torch.randn(BATCH, 4, 32, 32, device=device)
    t, y = torch.randint(1000, (BATCH,), device=device), torch.randint(1000, (BATCH,), device=device)
    mask = sample_mask(BATCH, 256, MASK_RATIO, torch.Generator(device).manual_seed(0))
    functions = {"full": lambda: mdt(x, t, y), "masked": lambda: mdt(x, t, y, mask=mask),
                 "diffusers DiT": lambda: dit(x, timestep=t, class_labels=y)}
    figures = {}
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            seconds = medians(functions, 4 if arguments.quick else 25, synchronise)
        print(name, "  ".join(f"{key} {value * 1e3:.1f} ms" for key, value in seconds.items()))
        suffix = "" if name == "fp32" else "_bf16"
        figures[f"full_pass_time_vs_diffusers_dit{suffix}"] = seconds["full"] / seconds["diffusers DiT"]
        figures[f"masked_to_full_time{suffix}"] = seconds["masked"] / seconds["full"]
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print(json.dumps({"name": "forward", "machine": machine, "figures": {k: round(v, 4) for k, v in figures.items()}}))


if __name__ == "__main__":
    main()
