"""Training steps on a GPU: images/s, peak memory and MFU by size and batch, against the published way on the same GPU.

    python benchmarks/train_sweep.py [--sizes s b xl] [--batch-sizes 64 128 256 512] [--profile trace.json]

For every size: the published way in eager fp32 and in TF32, ours in bf16, eager and compiled, each at all batch sizes until
memory ends. MFU counts the multiply-adds of both passes, three times (backward is twice forward), whatever the step really
computes, over the GPU's dense bf16 peak (nan where that is not known).
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

PEAKS = {name: GPUS[key].peak["bf16"] for name, key in (("H100", "h100"), ("H200", "h200"), ("A100", "a100-80gb"))}
"""Operations a second in dense bf16 of the SXM cards, by what torch's name of a device contains."""
CALL = 10
"""Steps in one go, as in training: the host runs ahead of the GPU, which is waited for at the end."""


def steps_of(kind: str, size: str, batch_size: int, device: torch.device) -> Callable[[], None]:
    """CALL steps of a kind, ready to be called; what was there before is forgotten."""
    gc.collect()  # (compiled modules hold each other)
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    config = settings(size, batch_size, precision="bf16", compile=kind == "bf16 compiled")
    batch = random_batch(config, device)
    torch.manual_seed(0)
    model = build_model(config.model, config.loss.passes).to(device)
    if kind.startswith("published"):
        step = PublishedStep(model, config.loss.mask_ratio)

        def published() -> None:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = kind == "published tf32"
            for _ in range(CALL):
                step(batch)

        return published
    ours = Ours(config, model.state_dict(), device)
    return lambda: ours.run(batch, CALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", default=["s", "b", "xl"], choices=("s", "b", "l", "xl"))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--kinds", nargs="+", default=["published fp32", "published tf32", "bf16", "bf16 compiled"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", help="profile the fastest step of each size, with a trace of the last in this file "
                                          "(chrome://tracing)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    synchronise = torch.cuda.synchronize if on_gpu else lambda: None
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak_flops = next((value for key, value in PEAKS.items() if key in name), float("nan"))
    figures: dict[str, float] = {}
    for size in arguments.sizes:
        flops = cost.count(settings(size, 1), torch.bfloat16, on_gpu=True).training_flops
        print(f"MDT-{size.upper()}/2: {flops / 1e9:.0f} GFLOP an image")
        rates: dict[tuple[str, int], float] = {}
        for kind in arguments.kinds:
            for batch_size in arguments.batch_sizes:
                try:
                    steps = steps_of(kind, size, batch_size, device)
                    seconds = medians({kind: steps}, arguments.rounds, synchronise)[kind] / CALL
                except RuntimeError as error:  # out of memory, as torch, cuBLAS or the compiler call it
                    print(f"  {kind:<15} batch {batch_size:4}  {str(error).splitlines()[0][:90]}", flush=True)
                    break
                finally:
                    steps = None
                rate = rates[kind, batch_size] = batch_size / seconds
                peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else float("nan")
                print(f"  {kind:<15} batch {batch_size:4}  {rate:8.1f} images/s  {seconds * 1e3:7.1f} ms  {peak:5.1f} GB  "
                      f"{rate * flops / 1e12:6.1f} TFLOP/s  MFU {rate * flops / peak_flops:.1%}", flush=True)
        best = {kind: max((rate for (k, _), rate in rates.items() if k == kind), default=None) for kind in arguments.kinds}
        ours = {key: rate for key, rate in rates.items() if not key[0].startswith("published")}
        if ours:
            (kind, batch_size), rate = max(ours.items(), key=lambda item: item[1])
            figures |= {f"images_per_second_{size}": rate, f"mfu_{size}": rate * flops / peak_flops}
            figures |= {f"speedup_{size}_vs_{name.replace(' ', '_')}": rate / value for name, value in best.items()
                        if name.startswith("published") and value}
            print(f"  fastest: {kind}, batch {batch_size}")
            if arguments.profile:
                print(profiled(steps_of(kind, size, batch_size, device), on_gpu, arguments.profile))
    print(json.dumps({"name": "train_sweep", "machine": name, "figures": {k: round(v, 4) for k, v in figures.items()}}))


def profiled(steps: Callable[[], None], on_gpu: bool, trace: str) -> str:
    """The operations that take most of the time of CALL steps, as a table."""
    steps()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as seen:
        steps()
        if on_gpu:
            torch.cuda.synchronize()
    seen.export_chrome_trace(trace)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=80)


if __name__ == "__main__":
    main()
