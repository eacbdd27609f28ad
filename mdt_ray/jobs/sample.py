"""Job `sample`: pictures from a checkpoint, in this process. Not for metrics: `evaluate` draws the same images for them.

    run.json      settings, identity
    images/       <index>-<class>.png
    grid.png      a row for each class, named, or rows of the order drawn
    samples.npz   arr_0 (N, H, W, 3) uint8, arr_1 (N,) int64 labels, as ADM's tools read them; written last
"""

import dataclasses
import io

import numpy as np
import torch
from tqdm import tqdm

from mdt_ray import run_folder, storage
from mdt_ray.autocast import autocast_dtype
from mdt_ray.config import SampleConfig
from mdt_ray.inference import labels as names
from mdt_ray.inference.sampler import Sampler, labels_of
from mdt_ray.jobs import session
from mdt_ray.jobs.evaluate import resolve
from mdt_ray.report import figures

SAMPLES = "samples.npz"
COLUMNS = 8
"""Pictures in a row of the grid, at most."""


def sample(config: SampleConfig) -> str:
    """Draw config.num_samples images, of each class where classes are named; returns the URI of the grid.

    Does nothing where they are drawn. Raises ValueError for a missing checkpoint, unknown classes, and an output of another
    run.
    """
    checkpoint, sampling, inputs = resolve(config.checkpoint, config.sampling)
    config = dataclasses.replace(config, checkpoint=checkpoint, sampling=sampling, output=storage.absolute(config.output))
    facts = storage.read_json(storage.join(checkpoint, "state.json"))
    classes = names.asked_for(config.classes, facts)
    run = run_folder.describe("sample", config, inputs)
    run_folder.check_identity(config.output, run)
    grid = storage.join(config.output, "grid.png")
    if storage.exists(storage.join(config.output, SAMPLES)):
        return grid
    with run_folder.claim(config.output, run):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        session.full_float32()
        dtype = autocast_dtype(config.precision, torch.device(device))
        sampler = Sampler(checkpoint, sampling, device, dtype, config.compile)
        if classes:
            labels = torch.tensor(classes).repeat_interleave(config.num_samples)  # (N,)
        else:
            labels = labels_of(0, config.num_samples, sampler.num_classes, "random", config.seed)  # (N,)
        parts, first = [], 0
        with tqdm(total=len(labels), unit="image", desc="sample") as bar:
            for part in labels.split(config.batch_size):
                parts.append(sampler.draw(first, part, config.seed).permute(0, 2, 3, 1).numpy())  # (B, H, W, 3)
                first += len(part)
                bar.update(len(part))
        pictures = np.concatenate(parts)
        _write(config, pictures, labels.numpy(), names.id2label(facts["class_names"]) if facts["num_classes"] else {})
    return grid


def _write(config: SampleConfig, pictures: np.ndarray, labels: np.ndarray, words: dict[int, str]) -> None:
    for i, (pixels, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        name = f"{i:06d}-{label}.png" if label >= 0 else f"{i:06d}.png"
        storage.write_bytes(storage.join(config.output, "images", name), figures.picture(pixels))
    if config.classes:
        rows = [pictures[labels == label][:COLUMNS] for label in dict.fromkeys(labels.tolist())]
        titles = [words[label].partition(",")[0] for label in dict.fromkeys(labels.tolist())]
    else:
        rows = [pictures[first:first + COLUMNS] for first in range(0, len(pictures), COLUMNS)]
        titles = [f"{first} ..." for first in range(0, len(pictures), COLUMNS)]
    scale = max(0.52, pictures.shape[1] / 110)  # inches: no picture is made smaller
    storage.write_bytes(storage.join(config.output, "grid.png"), figures.grid(rows, titles, scale=scale))
    file = io.BytesIO()
    np.savez(file, arr_0=pictures, arr_1=labels)
    storage.write_bytes(storage.join(config.output, SAMPLES), file.getvalue())
