"""What Ray costs an evaluation: real runs of the digits' model (bf16, compiled, guided, 25 steps of DPM-Solver++).

    python benchmarks/evaluate_overhead.py [--quick] [--checkpoint RUN]

Both draw, decode and measure the same images in as many single-threaded processes as there are cores: `bare` does so in a
loop of its own, without Ray, files and streams; bare is measured before and after. Without a checkpoint, weights are random.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
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


def measure(quick: bool, checkpoint: str = "") -> dict[str, float]:
    """Figures by name."""
    from mdt_ray.jobs.evaluate import evaluate

    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint and checkpoints.resolve(storage.absolute(checkpoint))
        checkpoint = checkpoint or random_checkpoint(str(Path(folder) / "train"))
        config = dataclasses.replace(
            presets.digits().evaluate, checkpoint=checkpoint, output=str(Path(folder) / "out"), precision="bf16",
            compile=True, num_samples=2000 if quick else 50_000, chunk_size=250, sample_batch_size=125, keep_images=0,
            workers=WorkersConfig(num_workers=cores))
        few = dataclasses.replace(config, num_samples=1000 if quick else 10_000)
        before = bare_rate(few, cores)
        started = time.perf_counter()
        found = evaluate(config)
        wall = time.perf_counter() - started
        after = bare_rate(few, cores)
    rate, whole = found["samplers"]["images_per_second"], config.num_samples / wall
    print(f"bare {before:.1f} and {after:.1f} images/s, Ray {rate:.1f} in steady state, {whole:.1f} in all; samplers busy "
          f"{found['samplers']['busy_share']:.1%}")
    print(" ".join(f"{name}={value:.5g}" for name, value in found["metrics"].items()))
    return {"overhead_share": 1 - rate / ((before + after) / 2), "images_per_second": rate,
            "images_per_second_with_start": whole, "sampler_waiting_share": 1 - found["samplers"]["busy_share"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 images instead of 50,000")
    parser.add_argument("--checkpoint", default="", help="a training output; else random weights")
    arguments = parser.parse_args()
    figures = {name: round(value, 4) for name, value in measure(arguments.quick, arguments.checkpoint).items()}
    print(json.dumps({"name": "evaluate_overhead", "machine": platform.machine(), "figures": figures}))


if __name__ == "__main__":
    main()
