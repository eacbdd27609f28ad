"""Makes what the preset `fashion` needs of Fashion-MNIST's 70,000 pictures: Parquet files, a tiny VAE, a feature network.

`apt install dataset-fashion-mnist && python scripts/make_fashion.py` writes the pictures to runs/fashion/images/, which the
preset reads. The two networks are in the package; `--networks` trains them again (some 15 minutes on two cores), reads them
back and prints their quality on the 10,000 test pictures, which neither was trained on; exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import make_assets
from make_assets import Bar, FeatureSettings, VaeSettings

from mdt_ray.data.sources import ASSETS

IDX = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""
NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
PAD = 2
"""Black pixels round the 28x28 ones: 32x32 without resampling."""
NUM_TRAINING = 60_000
IMAGES_PER_FILE = 10_000
VAE = VaeSettings(block_out_channels=(16, 32, 48), kl_warmup_steps=500, num_steps=2500, shift_share=0.0, bf16=True)
"""32x32 -> 8x8, which are 64 tokens."""
FEATURES = FeatureSettings(num_steps=4000)
MAX_ERROR = 1e-2
"""Squared, per pixel value on [-1, 1]: 26 dB."""
MIN_ACCURACY = 0.88
"""On the test pictures, also through the VAE. (Convolutional networks of this size reach 0.90 to 0.92.)"""


def read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of unsigned bytes: two zeros, the type (8), the number of axes, their sizes, the values."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: begins with {data[:3]!r}, but an idx file of unsigned bytes begins with 00 00 08")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def read_fashion(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grey images (70000, 32, 32) uint8, the test pictures last, and labels (70000,) int64."""
    parts = ("train", "t10k")
    images = np.concatenate([read_idx(folder / f"{part}-images-idx3-ubyte.gz") for part in parts])
    labels = np.concatenate([read_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in parts])
    return np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD))), labels.astype(np.int64)


def write_pictures(output: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Parquet files in the layout of Hugging Face's ImageNet, IMAGES_PER_FILE each."""
    output.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), IMAGES_PER_FILE):
        part = slice(start, start + IMAGES_PER_FILE)
        path = output / f"fashion-{start // IMAGES_PER_FILE:05d}.parquet"
        make_assets.write_images(path, images[part], labels[part], NAMES, first=start)


def check(output: Path, images: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[list[Bar], str]:
    """Quality on the test pictures."""
    held_out = torch.arange(len(images)) >= NUM_TRAINING
    few = torch.arange(len(images)) >= NUM_TRAINING - 4000  # of the training pictures as many as tell
    bars, table = make_assets.vae_quality(output / "vae", images[few], held_out[few], seed, MAX_ERROR)
    return bars + make_assets.features_quality(output / "features.safetensors", output / "vae", images[few], labels[few],
                                               held_out[few], seed, MIN_ACCURACY), table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idx", type=Path, default=IDX, metavar="DIR", help="the four idx files (default: Debian's)")
    parser.add_argument("--output", type=Path, default=Path("runs/fashion/images"), metavar="DIR")
    parser.add_argument("--networks", type=Path, nargs="?", const=ASSETS / "fashion", metavar="DIR",
                        help="also train the networks; by default into the package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    images, labels = read_fashion(args.idx)
    write_pictures(args.output, images, labels)
    print(f"{args.output}: {len(images)} pictures ({time.perf_counter() - started:.0f} s)")
    if args.networks is None:
        return 0
    pictures = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1)  # (N, 3, 32, 32)
    targets = torch.from_numpy(labels)
    make_assets.train_networks(args.networks, pictures[:NUM_TRAINING], targets[:NUM_TRAINING], VAE, FEATURES, args.seed)
    bars, table = check(args.networks, pictures, targets, args.seed + 1)
    print(f"{args.networks} ({time.perf_counter() - started:.0f} s)\n{make_assets.format_bars(bars)}\n{table}")
    return 0 if all(bar.passed for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
