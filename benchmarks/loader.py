"""Training's batches against what people write by hand: one .npy per image in a DataLoader, Ray Data; and waiting for them.

    python benchmarks/loader.py [--quick]

Latents of 256-pixel images (4x32x32, 16 kB an image) in the page cache. Reading alone is compared with reading alone: one
epoch of shuffled rows as batches of tensors, ours in one thread, everything warm. Our batches with all their random numbers
are a rate of their own. In turn, several rounds, medians.
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray.data
import torch
from ray.data.collate_fn import NumpyBatchCollateFn
from torch.utils.data import DataLoader, Dataset

from mdt_ray.data import latents
from mdt_ray.data.latent_reader import LatentReader
from mdt_ray.data.loader import SPARE_GROUPS, Loader, LoaderConfig
from mdt_ray.data.order import NUM_SLOTS, Order
from mdt_ray.jobs import session

SHAPE, BATCH, LANES, WORKERS = [4, 32, 32], 256, 64, 8
CONSUMED = 4000
"""Images/s that a worker takes: 64 MB/s."""


def write_latents(folder: Path, num_files: int) -> None:
    """Files of 4096 images; all are one by another name, so that a large data set takes little room."""
    moments = np.random.default_rng(0).normal(size=(4096, 2, *SHAPE)).astype(np.float16)
    table = latents.encode_table([str(i) for i in range(4096)], [i % 1000 for i in range(4096)], moments, None, 0.0, {})
    first = latents.write_file(str(folder), "chunk-00000.parquet", table, 128)
    files = [dataclasses.replace(first, name=latents.file_name(number)) for number in range(num_files)]
    for file in files[1:]:
        os.link(folder / first.name, folder / file.name)
    latents.write_manifest(str(folder), latents.Manifest(
        identity="", shape=SHAPE, image_size=256, vae={"scale": 0.18215, "shift": 0.0}, num_classes=1000,
        class_counts=[0] * 1000, class_names=[""] * 1000, flip=False, files=files))


# Waiting


def waiting(folder: Path, steps: int) -> tuple[float, float, float]:
    """Share of its time that a worker of 8 waits for batches while it takes CONSUMED images/s; the same of what its sleeps
    last too long, which is what the machine's other work costs; and images/s when it never sleeps. It holds 160 of 10,016
    row groups, so it reads all the time."""
    config = LoaderConfig(batch_size=BATCH * WORKERS, num_lanes=LANES, seed=0, num_classes=1000, class_dropout_prob=0.1,
                          num_tokens=256)
    with Loader(str(folder), latents.open_manifest(str(folder)), config, 0, WORKERS) as loader:
        batches, waited, late = loader.batches(0), 0.0, 0.0
        for _ in range(20):
            next(batches)
        time.sleep(1)  # all is ready, as behind any step that takes its time
        for _ in range(steps):
            started = time.perf_counter()
            next(batches)
            taken = time.perf_counter()
            time.sleep(BATCH / CONSUMED)
            waited += taken - started
            late += time.perf_counter() - taken - BATCH / CONSUMED
        started = time.perf_counter()
        for _ in range(100):
            next(batches)
        rate = 100 * BATCH / (time.perf_counter() - started)
    busy = steps * BATCH / CONSUMED
    return waited / (waited + busy), late / (late + busy), rate


def waiting_for_a_store(folder: Path, steps: int, seconds: float = 0.15) -> float:
    """The same with every row group `seconds` late: three requests of 50 ms."""
    read_group = latents.read_group

    def late(*arguments, **keywords) -> dict[str, np.ndarray]:
        time.sleep(seconds)
        return read_group(*arguments, **keywords)

    latents.read_group = late
    try:
        return waiting(folder, steps)[0]
    finally:
        latents.read_group = read_group


# Reading alone


def ours(folder: Path) -> float:
    """images/s of one epoch in training's order, in one thread, with as many row groups held as by a worker of 8."""
    lanes = LANES // WORKERS
    reader = LatentReader(str(folder), latents.open_manifest(str(folder)), lanes * (NUM_SLOTS + SPARE_GROUPS))
    order = Order(reader.group_sizes, BATCH, lanes, 0)
    rates = []
    for epoch in range(2):  # the first one warms up
        started = time.perf_counter()
        for images in np.split(order.permutation(epoch), range(BATCH, reader.num_images, BATCH)):
            moments, labels = map(torch.from_numpy, reader.read(images))
        rates.append(reader.num_images / (time.perf_counter() - started))
    assert moments.shape[1:] == (2, *SHAPE)
    assert len(labels) == len(moments)
    return rates[-1]


class Files(Dataset):
    """A file of features and a file of the label for every image, as fast-DiT has it."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.from_numpy(np.load(self.folder / f"{index}.npy")),
                torch.from_numpy(np.load(self.folder / f"{index}_label.npy")))


def write_files(folder: Path, count: int) -> None:
    folder.mkdir()
    moments = np.random.default_rng(0).normal(size=(256, 2, *SHAPE)).astype(np.float16)
    for i in range(count):
        np.save(folder / f"{i}.npy", moments[i % 256])
        np.save(folder / f"{i}_label.npy", np.array([i % 1000]))


def file_per_image(folder: Path, count: int, num_workers: int) -> float:
    """images/s of one shuffled epoch, from its first batch on (processes starting do not count)."""
    batches = iter(DataLoader(Files(folder, count), batch_size=BATCH, shuffle=True, num_workers=num_workers))
    next(batches)
    started = time.perf_counter()
    found = sum(len(moments) for moments, _ in batches)
    return found / (time.perf_counter() - started)


class Collate(NumpyBatchCollateFn):
    def __call__(self, batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        moments = np.frombuffer(bytearray().join(batch["moments"]), np.float16).reshape(-1, 2, *SHAPE)
        return torch.from_numpy(moments), torch.from_numpy(batch["label"].copy())


def ray_data(folder: Path, shuffled: bool) -> float:
    """images/s of `iter_torch_batches` over the same files, with the start that every epoch has: in file order, or shuffled
    in a buffer of 32 batches."""
    data = ray.data.read_parquet([str(p) for p in sorted(folder.glob("*.parquet"))]).select_columns(["label", "moments"])
    started = time.perf_counter()
    batches = data.iter_torch_batches(batch_size=BATCH, collate_fn=Collate(), prefetch_batches=4,
                                      local_shuffle_buffer_size=32 * BATCH if shuffled else None)
    found = sum(len(moments) for moments, _ in batches)
    return found / (time.perf_counter() - started)


def reading(folder: Path, quick: bool) -> dict[str, float]:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    count = 4096 if quick else 10240
    write_files(folder / "files", count)
    rates: dict[str, list[float]] = {}
    for _ in range(3):
        rates.setdefault("ours", []).append(ours(folder / "latents"))
        for workers in (0, 1, 2):
            rates.setdefault(f"file per image, {workers} workers", []).append(
                file_per_image(folder / "files", count, workers))
    session.start()
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray_data(folder / "latents", shuffled=False)  # its workers start
    for _ in range(2):
        rates["ours"].append(ours(folder / "latents"))
        rates.setdefault("Ray Data", []).append(ray_data(folder / "latents", shuffled=True))
        rates.setdefault("Ray Data, in file order", []).append(ray_data(folder / "latents", shuffled=False))
    found = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in found.items():
        print(f"reading alone, {name}: {rate:.0f} images/s")
    return {"speedup_vs_file_per_image": found["ours"] / max(found[f"file per image, {n} workers"] for n in (0, 1, 2)),
            "speedup_vs_ray_data": found["ours"] / found["Ray Data"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs, fewer steps: within a minute on 2 cores")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    folder, steps, rounds = Path(tempfile.mkdtemp(prefix="loader-")), 100 if quick else 626, 1 if quick else 3
    try:
        write_latents(folder / "imagenet", 313)  # 626 steps are an epoch of it, and see one change of epoch
        write_latents(folder / "latents", 10 if quick else 40)
        found = [waiting(folder / "imagenet", steps) for _ in range(rounds)]
        share, late, rate = (statistics.median(values) for values in zip(*found, strict=True))
        store = statistics.median(waiting_for_a_store(folder / "imagenet", steps) for _ in range(rounds))
        print(f"a worker that takes {CONSUMED} images/s waits {share:.1%} of its time ({store:.1%} with row groups 0.15 s "
              f"late; its sleeps alone are {late:.1%} too long); batches with all their noise: {rate:.0f} images/s at most")
        figures = {"share_of_step_waiting": share, "share_of_step_waiting_store": store, "batches_images_per_second": rate}
        figures |= reading(folder, quick)
    finally:
        shutil.rmtree(folder)
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    print(json.dumps({"name": "loader", "machine": machine, "figures": {k: round(v, 4) for k, v in figures.items()}}))


if __name__ == "__main__":
    main()
