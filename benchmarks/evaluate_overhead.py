"""What Ray costs an evaluation: real runs of the digits' model (bf16, compiled, guided, 25 steps of DPM-Solver++).

    python benchmarks/evaluate_overhead.py [--quick] [--checkpoint RUN]

Both draw, decode and measure the same images in as many single-threaded processes as there are cores: `bare` does so in a
loop of its own, without Ray, files and streams. Without a checkpoint, weights are random.

`overhead_share` is the share of all processors' time (the driver's, Ray's and the actors', in steady state) that no stage
spends in its work, and of the samplers' time that they wait. Processors' time, because a shared machine's clock tells the
neighbours' load as well; the images/s of bare processes are measured before and after for comparison.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from mdt_ray import checkpoints, config_io, presets, storage
from mdt_ray.autocast import autocast_dtype
from mdt_ray.config import EvaluateConfig, VaeConfig, WorkersConfig
from mdt_ray.data.vae import load_vae
from mdt_ray.evaluation import chunks
from mdt_ray.evaluation.extractors import load_extractor
from mdt_ray.inference.sampler import draw_latents, labels_of, load_decoder, load_networks
from mdt_ray.training import state as states
from mdt_ray.training.optim import build_optimizer
from mdt_ray.training.step import build_model


def random_checkpoint(output: str) -> str:
    """The digits' model, untrained, as `train` writes it."""
    config = presets.digits().train
    torch.manual_seed(0)
    model = build_model(config.model)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    vae = load_vae(VaeConfig(path="digits"))
    facts = {"vae": {"path": "digits", "revision": None, "scale": vae.scale, "shift": vae.shift,
                     "weights_hash": vae.weights_hash},
             "image_size": 32, "latent_shape": [4, 4, 4], "class_names": [str(c) for c in range(10)], "num_classes": 10}
    state = states.TrainState(model=model, ema=model, optimizer=build_optimizer(model, config.optim))
    state.history.append({"step": 0, "loss": 1.0})
    return states.save_checkpoint(state, output, {"config": config_io.to_dict(config), "versions": {}}, facts)


def bare(plain: dict, share: int, num_shares: int, ready, go, spent) -> None:
    """One process: its chunks of the evaluation, one after another."""
    torch.set_num_threads(1)
    config = config_io.from_dict(EvaluateConfig, plain)
    networks = load_networks(config.checkpoint, config.sampling, "cpu",
                             autocast_dtype(config.precision, torch.device("cpu")), config.compile)
    vae, extractor = load_decoder(networks.facts), load_extractor(config.extractor)

    def chunk(start: int, stop: int) -> None:
        labels = labels_of(start, stop, networks.num_classes, config.labels, config.seed)
        latents = torch.cat([draw_latents(networks, config.sampling, start + first, part, config.seed)
                             for first, part in zip(range(0, stop - start, config.sample_batch_size),
                                                    labels.split(config.sample_batch_size), strict=True)])
        pictures = torch.cat([vae.decode(part) for part in latents.split(config.sample_batch_size)])
        pixels = pictures.permute(0, 2, 3, 1).contiguous().numpy()
        chunks.measure(extractor, pixels, labels.numpy(), np.arange(0))

    chunk(0, config.sample_batch_size)
    ready.release()
    go.wait()
    started = time.perf_counter()
    starts = range(0, config.num_samples, config.chunk_size)
    for start in starts[share::num_shares]:
        chunk(start, min(start + config.chunk_size, config.num_samples))
    spent.put(time.perf_counter() - started)


def bare_rate(config: EvaluateConfig, num_processes: int) -> float:
    """images/s of as many processes, from when all have loaded."""
    context = multiprocessing.get_context("spawn")
    ready, go, spent = context.Semaphore(0), context.Event(), context.Queue()
    processes = [context.Process(target=bare, args=(config_io.to_dict(config), k, num_processes, ready, go, spent))
                 for k in range(num_processes)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    go.set()
    seconds = [spent.get() for _ in processes]
    for process in processes:
        process.join()
    return config.num_samples / max(seconds)


class Accountant(threading.Thread):
    """Notes every second, while a job runs, the processor seconds of this process and all below it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rows: list[tuple[float, float]] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(1.0):
            seconds = 0.0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    seconds += sum(process.cpu_times()[:2])
            self.rows.append((time.time(), seconds))


def timed(worker: type) -> type:
    """A stage whose rows also have the processor seconds of its own thread (the only one that computes), added up over the
    stages, and when it ended."""
    class Timed(worker):
        def __call__(self, item: dict) -> dict:
            started = time.thread_time()
            row = super().__call__(item)
            return row | {"model_seconds": item.get("model_seconds", 0.0) + time.thread_time() - started, "at": time.time()}

    return Timed


def overhead_of(rows: list[dict], accounts: list[tuple[float, float]]) -> float:
    """Share of all processor seconds that no stage spent, from a fifth of the images to 95%."""
    ends = sorted(row["at"] for row in rows if "drawer" in row)
    steady = [row for row in accounts if ends[len(ends) // 5] <= row[0] <= ends[int(0.95 * len(ends)) - 1]]
    (began, before), (ended, after) = steady[0], steady[-1]
    return 1 - sum(row["model_seconds"] for row in rows if began < row["at"] <= ended) / (after - before)


def measure(quick: bool, checkpoint: str = "", num_samples: int | None = None) -> dict[str, float]:
    """Figures by name."""
    from mdt_ray.jobs import draw_stages, drawing
    from mdt_ray.jobs.evaluate import evaluate

    rows: list[dict] = []
    busy_of = drawing._busy
    drawing._busy = lambda found: (rows.extend(found), busy_of(found))[1]
    for name in ("Draw", "Decode", "Measure"):
        setattr(draw_stages, name, timed(getattr(draw_stages, name)))
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint and checkpoints.resolve(storage.absolute(checkpoint))
        checkpoint = checkpoint or random_checkpoint(str(Path(folder) / "train"))
        config = dataclasses.replace(
            presets.digits().evaluate, checkpoint=checkpoint, output=str(Path(folder) / "out"), precision="bf16",
            compile=True, num_samples=num_samples or (3000 if quick else 50_000), chunk_size=100 if quick else 500,
            keep_images=0, workers=WorkersConfig(num_workers=cores))
        few = dataclasses.replace(config, num_samples=1000 if quick else 10_000)
        before = bare_rate(few, cores)
        accountant = Accountant()
        accountant.start()
        started = time.perf_counter()
        found = evaluate(config)
        wall = time.perf_counter() - started
        accountant.done.set()
        after = bare_rate(few, cores)
    rate, busy = found["samplers"]["images_per_second"], found["samplers"]["busy_share"]
    share = overhead_of(rows, accountant.rows)
    print(f"bare {before:.1f} and {after:.1f} images/s, Ray {rate:.1f}; {share:.1%} of the processors' time is no model's, "
          f"samplers wait {1 - busy:.1%} of theirs")
    print(" ".join(f"{name}={value:.5g}" for name, value in found["metrics"].items()))
    return {"overhead_share": 1 - (1 - share) * busy, "overhead_share_by_the_clock": 1 - 2 * rate / (before + after),
            "images_per_second": rate, "images_per_second_with_start": config.num_samples / wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3,000 images instead of 50,000, in smaller chunks")
    parser.add_argument("--num-samples", type=int, help="instead of 50,000")
    parser.add_argument("--checkpoint", default="", help="a training output; else random weights")
    arguments = parser.parse_args()
    found = measure(arguments.quick, arguments.checkpoint, arguments.num_samples)
    figures = {name: round(value, 4) for name, value in found.items()}
    print(json.dumps({"name": "evaluate_overhead", "machine": platform.machine(), "figures": figures}))


if __name__ == "__main__":
    main()
