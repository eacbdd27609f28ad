"""precompute against what people write by hand: one .npy per image, a bare loop of the VAE; decoding, memory, reading back.

    python benchmarks/precompute.py [--quick] [--only NAME ...]

All rates are steady: between the first and the last chunk that arrives, so that processes starting up do not count; how
long that took is printed. Each part measures its baseline and ours in turn in one run; several rounds, medians.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mdt_ray import config_io, storage
from mdt_ray.config import PrecomputeConfig, VaeConfig
from mdt_ray.data import images, latents, listings
from mdt_ray.data.latent_reader import LatentReader
from mdt_ray.data.vae import load_vae, to_unit_range
from mdt_ray.jobs import fanout, progress, session
from mdt_ray.jobs.encode import Encoder
from mdt_ray.jobs.precompute import cut, prepare


def jpegs(count: int, size: Callable[[np.random.Generator], tuple[int, int]], quality: int = 90) -> list[bytes]:
    """Pictures with detail at every scale, as photographs have, encoded as JPEG."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        width, height = size(rng)
        picture = np.zeros((height, width, 3), np.float32)
        for octave in range(2, 8):
            coarse = rng.normal(128, 110 / octave, (2**octave, 2**octave, 3)).clip(0, 255).astype(np.uint8)
            layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            picture += np.asarray(layer, np.float32) - 128
        buffer = io.BytesIO()
        Image.fromarray((picture / 2 + 128).clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=quality)
        found.append(buffer.getvalue())
    return found


def folder_of(root: Path, encoded: list[bytes], count: int) -> Path:
    """A folder of `count` pictures in 10 classes."""
    for i in range(count):
        path = root / f"c{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded[i % len(encoded)])
    return root


class TimedEncoder(Encoder):
    """Says when it finished a chunk: Ray hands results on one chunk later."""

    def __call__(self, item: dict) -> dict:
        return super().__call__(item) | {"finished": time.time()}


def steady_rate(config: PrecomputeConfig) -> tuple[float, float, float]:
    """The pipeline of `precompute` without its summary: images/s between first and last chunk, and of start-up and all the
    seconds. What the job does before and after is counted in neither rate."""
    config, source, _ = prepare(config)
    listing = listings.list_images(source)
    parts = cut(listing, source.kind, config.chunk_size)
    listings.write_parts(storage.join(config.output, listings.PLAN), listing, parts)
    storage.write_json(storage.join(config.output, "lock.json"), {"token": "benchmark"})
    started = time.time()
    marks = []
    with progress.watched(lambda row: None) as mailbox:
        arguments = (config_io.to_dict(config), source.folder, source.kind, "benchmark", "benchmark", mailbox)
        for row in fanout.run_chunks([{"chunk": k} for k in range(len(parts))], TimedEncoder, arguments, config.workers,
                                     calls_per_worker=2):
            marks.append((row["finished"] - started, json.loads(row["entry"])["num_read"]))
    marks.sort()
    first, last = marks[0][0], marks[-1][0]
    return sum(n for _, n in marks[1:]) / (last - first), first, last


# One .npy per image


class OneByOne(Dataset):
    """Pictures as torchvision-style code reads them."""

    def __init__(self, root: Path, size: int):
        self.paths, self.size = sorted(root.rglob("*.jpg")), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = images.center_crop(images.decode_image(self.paths[index].read_bytes()), self.size)
        return to_unit_range(torch.from_numpy(pixels.copy())[None])[0], int(self.paths[index].parent.name[1:])


def one_npy_per_image(root: Path, out: Path, size: int) -> float:
    """images/s of a DataLoader with batch 1, the VAE on each image, two small files an image."""
    vae = load_vae(VaeConfig(path="digits"))
    out.mkdir(parents=True)
    marks = []
    with torch.inference_mode():
        for i, (x, y) in enumerate(DataLoader(OneByOne(root, size), batch_size=1, num_workers=1)):
            moments = vae.encode(x)[0].numpy()
            np.save(out / f"{i:06d}.npy", moments)
            np.save(out / f"{i:06d}_label.npy", y.numpy())
            marks.append(time.perf_counter())
    skip = len(marks) // 10
    return (len(marks) - skip - 1) / (marks[-1] - marks[skip])


def against_npy(quick: bool, folder: Path) -> dict[str, float]:
    count = 3000 if quick else 12000
    root = folder_of(folder / "small", jpegs(200, lambda rng: (32, 32)), count)
    ours, theirs = [], []
    for turn in range(1 if quick else 3):
        theirs.append(one_npy_per_image(root, folder / f"npy-{turn}", 32))
        config = config_io.override(PrecomputeConfig(), {
            "source": str(root), "output": str(folder / f"ours-{turn}"), "vae.path": "digits", "image_size": 32,
            "chunk_size": 250 if quick else 500,
            "workers.num_workers": 2})  # the other one decodes in a process of its own: two in all, too
        rate, first, last = steady_rate(config)
        ours.append(rate)
        print(f"digits VAE, JPEG 32x32: one .npy an image {theirs[-1]:.0f} images/s, precompute {rate:.0f} images/s "
              f"(first chunk after {first:.1f} s, all after {last:.1f} s)")
    return {"speedup_vs_one_npy_per_image": statistics.median(ours) / statistics.median(theirs)}


# A bare loop of the VAE


def sd_vae(folder: Path) -> str:
    """Stable Diffusion's autoencoder with random weights, on disk."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=256)
    model.save_pretrained(folder / "sd-vae")
    return str(folder / "sd-vae")


def against_bare_loop(quick: bool, folder: Path, device: str) -> dict[str, float]:
    gpu = device == "cuda"
    path, size = sd_vae(folder), 256 if gpu else 128
    batch, batches, chunks = (64, 20, 8) if gpu else (4, 2, 5 if quick else 12)
    root = folder_of(folder / "large", jpegs(32, lambda rng: (500, 400)), batch * batches * chunks)
    figures = {}
    for precision in ("fp32", "bf16"):
        if quick and precision == "bf16":
            continue
        bare, ours = [], []
        for turn in range(1 if quick else 3):
            bare.append(bare_loop(path, size, batch, max(batches * chunks // 4, 4), precision, device))
            config = config_io.override(PrecomputeConfig(), {
                "source": str(root), "output": str(folder / f"sd-{precision}-{turn}"), "vae.path": path, "image_size": size,
                "chunk_size": batch * batches, "encode_batch_size": batch, "precision": precision,
                "decoders_per_worker": 12 if gpu else 2, "workers.gpus_per_worker": 1.0 if gpu else 0.0})
            rate, first, last = steady_rate(config)
            ours.append(rate)
            print(f"SD VAE {size}x{size} {precision}: bare loop {bare[-1]:.2f} images/s, precompute {rate:.2f} images/s "
                  f"(first chunk after {first:.1f} s, all after {last:.1f} s)")
        suffix = "" if precision == "fp32" else "_bf16"
        figures[f"share_of_bare_encode_loop{suffix}"] = statistics.median(o / b for o, b in zip(ours, bare, strict=True))
    return figures


BARE = """
import sys, time, torch
from mdt_ray.config import VaeConfig
from mdt_ray.data.vae import load_vae
path, size, batch, batches, precision, device = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5], sys.argv[6]
torch.set_num_threads(1)
vae = load_vae(VaeConfig(path=path), device)
x = torch.rand(batch, 3, size, size, device=device) * 2 - 1
marks = []
for _ in range(batches + 1):
    vae.encode(x, torch.bfloat16 if precision == "bf16" else None).half().cpu()
    marks.append(time.perf_counter())
print(batch * batches / (marks[-1] - marks[0]))
"""


def bare_loop(path: str, size: int, batch: int, batches: int, precision: str, device: str) -> float:
    """images/s of the VAE on a tensor that is there already, with the threads that an encoder has, in its own process."""
    done = subprocess.run([sys.executable, "-c", BARE, path, str(size), str(batch), str(batches), precision,
                           device], capture_output=True, text=True, check=True)
    return float(done.stdout)


# Decoding


def decoding(quick: bool, folder: Path) -> dict[str, float]:
    encoded = jpegs(40 if quick else 200, lambda rng: (int(rng.integers(380, 501)), int(rng.integers(333, 450))))
    rates: dict[str, list[float]] = {"ours": [], "draft": []}
    for _ in range(3):
        for name, decode in (("ours", images.decode_image), ("draft", _draft)):
            started = time.perf_counter()
            for data in encoded:
                images.center_crop(decode(data), 256)
            rates[name].append(len(encoded) / (time.perf_counter() - started))
    large = jpegs(20, lambda rng: (1600, 1200))
    same = all(np.array_equal(images.center_crop(_draft(d), 256), images.center_crop(images.decode_image(d), 256))
               for d in large)
    print(f"decode and crop to 256 from JPEGs of about 440x390: {statistics.median(rates['ours']):.0f} images/s a core; "
          f"with Pillow's draft mode {statistics.median(rates['draft']):.0f} "
          f"({'the same' if same else 'other'} pixels on large pictures)")
    return {"decode_images_per_second": statistics.median(rates["ours"])}


def _draft(data: bytes) -> Image.Image:
    """Pillow's scaled decoding, which halves in the frequency domain: fast for large pictures, but not ADM's pixels."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (512, 512))
    return image.convert("RGB")


# Memory


def memory(quick: bool, folder: Path) -> dict[str, float]:
    """Peak memory of all processes of the job (shared pages counted once), for 10,000 and for 50,000 images."""
    small, large = (1000, 5000) if quick else (10_000, 50_000)
    encoded = jpegs(200, lambda rng: (64, 64))
    peaks = []
    for count in (small, large):
        root = folder_of(folder / f"memory-{count}", encoded, count)
        peaks.append(_peak([sys.executable, "-m", "mdt_ray.cli", "precompute", "--source", str(root), "--output",
                            str(folder / f"memory-out-{count}"), "--vae.path", "digits", "--image-size", "64",
                            "--chunk-size", "1000"]))
        print(f"{count} images: peak {peaks[-1] / 2**20:.0f} MiB in all processes")
    return {"peak_memory_ratio_50k_vs_10k": peaks[1] / peaks[0]}


def _peak(command: list[str]) -> int:
    """Largest sum of proportional set sizes over the process and its descendants, and Ray's (started by it)."""
    import psutil

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"})
    peak = 0
    while process.poll() is None:
        total = 0
        with contextlib.suppress(psutil.Error):
            for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += child.memory_full_info().pss
        peak = max(peak, total)
        time.sleep(0.5)
    assert process.returncode == 0, process.stderr.read()
    return peak


# Reading back


def reading(quick: bool, folder: Path) -> dict[str, float]:
    """Images/s of shuffled reading, one process: row groups of our files, and one .npy per image; ImageNet's 256-pixel
    latents, in the page cache."""
    count, rng = (4096 if quick else 20480), np.random.default_rng(0)
    (folder / "files").mkdir()
    moments = rng.normal(size=(count, 2, 4, 32, 32)).astype(np.float16)
    for i in range(count):
        np.save(folder / "files" / f"{i:06d}.npy", moments[i])
        np.save(folder / "files" / f"{i:06d}_label.npy", np.int64(i % 1000))
    rates = {"one .npy an image": []} | {f"row groups of {rows}": [] for rows in (64, 128, 256)}
    for rows in (64, 128, 256):
        _write_latents(folder / f"groups-{rows}", moments, rows)
    for _ in range(3 if quick else 5):
        order = rng.permutation(count)
        rates["one .npy an image"].append(_timed(lambda order=order: _read_npy(folder / "files", order), count))
        for size in (64, 128, 256):
            rates[f"row groups of {size}"].append(_timed(lambda size=size: _read_groups(folder / f"groups-{size}"), count))
    found = {name: statistics.median(values) for name, values in rates.items()}
    print("shuffled reading:", ", ".join(f"{name} {rate:.0f} images/s" for name, rate in found.items()))
    return {"read_speedup_vs_one_npy_per_image": found["row groups of 128"] / found["one .npy an image"]}


def _write_latents(folder: Path, moments: np.ndarray, rows_per_group: int) -> None:
    files = []
    for number, part in enumerate(np.split(moments, len(moments) // 4096 or 1)):
        rows = range(number * len(part), (number + 1) * len(part))
        table = latents.encode_table([str(i) for i in rows], [i % 1000 for i in rows], part, None, 0.0, {})
        files.append(latents.write_file(str(folder), latents.file_name(number), table, rows_per_group))
    latents.write_manifest(str(folder), latents.Manifest(
        identity="", shape=[4, 32, 32], image_size=256, vae={}, num_classes=1000, class_counts=[0] * 1000,
        class_names=[""] * 1000, flip=False, files=files))


def _read_npy(folder: Path, order: np.ndarray) -> None:
    for i in order:
        np.load(folder / f"{i:06d}.npy")
        np.load(folder / f"{i:06d}_label.npy")


def _read_groups(folder: Path) -> None:
    """As training reads: whole row groups in shuffled order."""
    reader = LatentReader(str(folder), latents.open_manifest(str(folder)), max_groups=2)
    for group in np.random.default_rng(0).permutation(len(reader.groups)):
        reader.read(np.arange(reader.starts[group], reader.starts[group + 1]))


def _timed(work: Callable[[], None], count: int) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


PARTS: dict[str, Callable[[bool, Path], dict[str, float]]] = {
    "npy": against_npy, "bare": None, "decode": decoding, "memory": memory, "read": reading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="small inputs, one round, and by default neither bare nor memory: a minute on 2 cores")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for name in arguments.only or (["npy", "decode", "read"] if arguments.quick else PARTS):
        folder = Path(tempfile.mkdtemp(prefix=f"precompute-{name}-"))
        try:
            if name in ("npy", "bare"):
                session.start()
            work = PARTS[name] or (lambda quick, folder: against_bare_loop(quick, folder, arguments.device))
            figures |= work(arguments.quick, folder)
        finally:
            shutil.rmtree(folder)
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    print(json.dumps({"name": "precompute", "machine": machine, "figures": {k: round(v, 4) for k, v in figures.items()}}))


if __name__ == "__main__":
    main()
