"""What Ray costs an evaluation: real runs of the digits' model (bf16, compiled, guided, 25 steps of DPM-Solver++).

    python benchmarks/evaluate_overhead.py [--quick] [--checkpoint RUN]

Both draw, decode and measure the same images in as many single-threaded processes as there are cores: `bare` does so in a
loop of its own, without Ray, files and streams; bare is measured before and after. Without a checkpoint, weights are random.

`overhead_share` is what remains of all processors' time (the driver's, Ray's and the actors', in steady state) and of the
samplers' own, when that of the bare processes for as many images is taken off. Processors' time, because a shared machine's
clock tells the neighbours' load as well; of a --quick run much is still the start.
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
from mdt_ray.config import EvaluateConfig, VaeConfig, WorkersConfig
from mdt_ray.data.vae import load_vae
from mdt_ray.evaluation import chunks
from mdt_ray.evaluation.extractors import load_extractor
from mdt_ray.inference.sampler import draw_latents, labels_of, load_decoder, load_networks
from mdt_ray.training import state as states
from mdt_ray.training.optim import build_optimizer
from mdt_ray.training.run import autocast_dtype
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
    started, processor = time.perf_counter(), time.process_time()
    starts = range(0, config.num_samples, config.chunk_size)
    for start in starts[share::num_shares]:
        chunk(start, min(start + config.chunk_size, config.num_samples))
    spent.put((time.perf_counter() - started, time.process_time() - processor))


def bare_cost(config: EvaluateConfig, num_processes: int) -> tuple[float, float]:
    """images/s of as many processes, from when all have loaded, and processor seconds an image."""
    context = multiprocessing.get_context("spawn")
    ready, go, spent = context.Semaphore(0), context.Event(), context.Queue()
    processes = [context.Process(target=bare, args=(config_io.to_dict(config), k, num_processes, ready, go, spent))
                 for k in range(num_processes)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    go.set()
    seconds, processor = zip(*(spent.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return config.num_samples / max(seconds), sum(processor) / config.num_samples


class Accountant(threading.Thread):
    """Adds up, while a job runs, the processor seconds of this process and all below it (Ray's, and its actors), and the
    images whose chunks are written."""

    def __init__(self, folder: Path, chunk_size: int):
        super().__init__(daemon=True)
        self.folder, self.chunk_size, self.rows, self.done = folder, chunk_size, [], threading.Event()

    def run(self) -> None:
        while not self.done.wait(1.0):
            images = self.chunk_size * len(list(self.folder.glob("*.safetensors")))
            seconds = 0.0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    seconds += sum(process.cpu_times()[:2])
            self.rows.append((images, seconds))

    def per_image(self, total: int) -> float:
        """Processor seconds an image, between a fifth and 95% of all."""
        steady = [row for row in self.rows if total / 5 <= row[0] <= 0.95 * total]
        (first, before), (last, after) = steady[0], steady[-1]
        return (after - before) / (last - first)


def measure(quick: bool, checkpoint: str = "", num_samples: int | None = None) -> dict[str, float]:
    """Figures by name."""
    from mdt_ray.jobs.evaluate import evaluate

    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint and checkpoints.resolve(storage.absolute(checkpoint))
        checkpoint = checkpoint or random_checkpoint(str(Path(folder) / "train"))
        config = dataclasses.replace(
            presets.digits().evaluate, checkpoint=checkpoint, output=str(Path(folder) / "out"), precision="bf16",
            compile=True, num_samples=num_samples or (2000 if quick else 50_000), chunk_size=250, sample_batch_size=125,
            keep_images=0, workers=WorkersConfig(num_workers=cores))
        few = dataclasses.replace(config, num_samples=1000 if quick else 10_000)
        before = bare_cost(few, cores)
        accountant = Accountant(Path(config.output) / "chunks", config.chunk_size)
        accountant.start()
        started = time.perf_counter()
        found = evaluate(config)
        wall = time.perf_counter() - started
        accountant.done.set()
        after = bare_cost(few, cores)
    rate, busy = found["samplers"]["images_per_second"], found["samplers"]["busy_share"]
    model, spent = (before[1] + after[1]) / 2, accountant.per_image(config.num_samples)
    print(f"bare {before[0]:.1f} and {after[0]:.1f} images/s, {before[1] * 1e3:.2f} and {after[1] * 1e3:.2f} ms of "
          f"processors an image; Ray {rate:.1f} images/s, {spent * 1e3:.2f} ms; samplers busy {busy:.1%}")
    print(" ".join(f"{name}={value:.5g}" for name, value in found["metrics"].items()))
    return {"overhead_share": 1 - model / spent * busy, "overhead_share_by_the_clock": 1 - 2 * rate / (before[0] + after[0]),
            "images_per_second": rate, "images_per_second_with_start": config.num_samples / wall,
            "sampler_waiting_share": 1 - busy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 images instead of 50,000")
    parser.add_argument("--num-samples", type=int, help="instead of 50,000")
    parser.add_argument("--checkpoint", default="", help="a training output; else random weights")
    arguments = parser.parse_args()
    found = measure(arguments.quick, arguments.checkpoint, arguments.num_samples)
    figures = {name: round(value, 4) for name, value in found.items()}
    print(json.dumps({"name": "evaluate_overhead", "machine": platform.machine(), "figures": figures}))


if __name__ == "__main__":
    main()
