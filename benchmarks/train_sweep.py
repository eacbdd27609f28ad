"""Training steps on a GPU: images/s, peak memory and MFU by size and batch, against the published way on the same GPU.

    python benchmarks/train_sweep.py [--sizes s b xl] [--batch-sizes 64 128 256 512] [--profile trace.json]

For every size: the published way in eager fp32 and in TF32, ours in bf16, eager and compiled, each at all batch sizes until
memory ends. MFU counts the multiply-adds of both passes, three times (backward is twice forward), whatever the step really
computes, over the GPU's dense bf16 peak. The fastest step of each size is profiled: the kernels that take most of its time.
On a CPU it only shows that it works: --device cpu --sizes s --batch-sizes 2.
"""

import argparse
import gc
import json
from collections.abc import Callable

import torch
from forward import medians
from published_step import PublishedStep
from torch.profiler import ProfilerActivity, profile
from train_step import Ours, random_batch, settings

from mdt_ray.jobs.plan_train import GPUS
from mdt_ray.training import cost
from mdt_ray.training.step import build_model

PEAK = GPUS["h100"].peak["bf16"]
"""Multiplies and adds a second of an H100 SXM (and H200), dense bf16."""


def step_of(kind: str, size: str, batch_size: int, device: torch.device) -> Callable[[], object]:
    """One step of a kind, ready to be called."""
    config = settings(size, batch_size, precision="bf16", compile=kind == "bf16 compiled")
    batch = random_batch(config, device)
    torch.manual_seed(0)
    model = build_model(config.model, config.loss.passes).to(device)
    if kind.startswith("published"):
        step = PublishedStep(model, config.loss.mask_ratio)

        def published() -> object:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = kind == "published tf32"
            return step(batch)

        return published
    ours = Ours(config, model.state_dict(), device)
    return lambda: ours.run(batch, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", default=["s", "b", "xl"], choices=("s", "b", "l", "xl"))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--kinds", nargs="+", default=["published fp32", "published tf32", "bf16", "bf16 compiled"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", help="file for the trace of the last size's fastest step (chrome://tracing)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    synchronise = torch.cuda.synchronize if on_gpu else lambda: None
    figures: dict[str, float] = {}
    for size in arguments.sizes:
        flops = cost.count(settings(size, 1), torch.bfloat16, on_gpu=True).training_flops
        print(f"MDT-{size.upper()}/2: {flops / 1e9:.0f} GFLOP an image")
        rates: dict[tuple[str, int], float] = {}
        for kind in arguments.kinds:
            for batch_size in arguments.batch_sizes:
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                try:
                    step = step_of(kind, size, batch_size, device)
                    seconds = medians({kind: step}, arguments.rounds, synchronise)[kind]
                except torch.OutOfMemoryError:
                    print(f"  {kind:<15} batch {batch_size:4}  out of memory")
                    break
                finally:
                    step = None
                    gc.collect()
                    torch.cuda.empty_cache()
                rate = rates[kind, batch_size] = batch_size / seconds
                peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else float("nan")
                print(f"  {kind:<15} batch {batch_size:4}  {rate:8.1f} images/s  {seconds * 1e3:7.1f} ms  {peak:5.1f} GB  "
                      f"{rate * flops / 1e12:6.1f} TFLOP/s  MFU {rate * flops / PEAK:.1%}", flush=True)
        best = {kind: max((rate for (k, _), rate in rates.items() if k == kind), default=None) for kind in arguments.kinds}
        ours = {key: rate for key, rate in rates.items() if not key[0].startswith("published")}
        if ours:
            (kind, batch_size), rate = max(ours.items(), key=lambda item: item[1])
            figures |= {f"images_per_second_{size}": rate, f"mfu_{size}": rate * flops / PEAK}
            figures |= {f"speedup_{size}_vs_{name.replace(' ', '_')}": rate / value for name, value in best.items()
                        if name.startswith("published") and value}
            print(f"  fastest: {kind}, batch {batch_size}")
            print(profiled(step_of(kind, size, batch_size, device), on_gpu, arguments.profile))
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(json.dumps({"name": "train_sweep", "machine": name, "figures": {k: round(v, 4) for k, v in figures.items()}}))


def profiled(step: Callable[[], object], on_gpu: bool, trace: str | None) -> str:
    """The operations that take most of a step's time, as a table."""
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as seen:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    if trace:
        seen.export_chrome_trace(trace)
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=80)


if __name__ == "__main__":
    main()
