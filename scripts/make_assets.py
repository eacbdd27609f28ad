"""Rebuilds mdt_ray/assets/digits: the images, a tiny VAE for them, and the feature network that judges them.

`python scripts/make_assets.py` (about 10 minutes on one core; needs scikit-learn, `pip install mdt-ray[assets]`)
writes the three, reads them back, prints their quality on images neither network was trained on, and exits with 1 if a
bar is missed. The same seed, threads, machine and package versions give the same files.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from mdt_ray.data.sources import DIGITS
from mdt_ray.evaluation.small import IMAGE_SIZE, NUM_POOL, SmallFeatures, is_held_out, load_small_features

# B batch, H = W = 32 image side, C = 4 latent channels, h = w = 4 latent side.
NUM_CLASSES = 10
ROWS_PER_GROUP = 64
MAX_FOR_SCALE = 4000
"""Images that tell the latents' scale."""
GREY_STEP = 4
"""Grey levels are multiples of 4 (and 255): invisible, as scans have 17 levels, and the PNGs are a fifth smaller."""


@dataclass(frozen=True, kw_only=True)
class VaeSettings:
    """How the VAE is built and trained; all of it measured on the held-out images."""

    block_out_channels: tuple[int, ...] = (16, 16, 32, 48)
    """Four levels: 32x32 -> 4x4. 429 thousand weights, 0.86 MB as float16."""
    norm_num_groups: int = 8
    kl_weight: float = 2e-3
    """On the KL per latent number (nats), against squared error per pixel value. Larger is smoother and blurrier."""
    kl_warmup_steps: int = 1000
    """The KL weight rises from 0. At weight 3e-3 from the start two of the four channels die (stay noise), with the
    rise one: held-out error 1.0e-3 against 1.9e-3."""
    num_steps: int = 3000
    batch_size: int = 64
    lr: float = 2e-3
    max_shift: int = 1
    """Pixels, one way or the other."""
    shift_share: float = 0.4
    """Share of images shifted. Without shifts held-out error is a third higher (2.0e-3 against 1.5e-3 in a trial)."""
    ema_decay: float = 0.998
    bf16: bool = False
    """Autocast: half the time on a CPU with AMX."""


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """How the feature network is trained."""

    num_steps: int = 1500
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    shape_weight: float = 1.0
    """On redrawing the clean 8x8 digit from `pool`: a classifier forgets all that does not tell classes apart."""
    whitening_weight: float = 0.03
    """On the distance of `pool`'s covariance from I. Without it 10 of 64 directions hold 91 % of the variance."""
    max_shift: int = 2
    ema_decay: float = 0.995


@dataclass(frozen=True)
class Bar:
    """One measured quality and what it must be."""

    name: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high  # False for NaN


# --- images ---------------------------------------------------------------------------------------------------------


def draw_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 scans, 8x8 with values 0..16, as grey images (N, 32, 32) uint8; and labels (N,) int64."""
    scans = load_digits()
    size, bicubic = (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC
    images = [Image.fromarray(scan.astype(np.float32) * (255 / 16)).resize(size, bicubic) for scan in scans.images]
    grey = np.rint(np.stack([np.asarray(image) for image in images]) / GREY_STEP) * GREY_STEP
    return grey.clip(0, 255).astype(np.uint8), scans.target.astype(np.int64)


def encode_png(grey: np.ndarray) -> bytes:
    """A grey image (H, W) uint8 as PNG of mode L, half the size of RGB: readers convert, as ImageNet has grey JPEGs."""
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def write_images(path: Path, images: np.ndarray, labels: np.ndarray, names: list[str], first: int = 0) -> None:
    """Grey images (N, H, W) uint8, labels (N,) and names of classes in the layout of Hugging Face's ImageNet files.

    first: number of the first image.
    """
    rows = [{"bytes": encode_png(image), "path": f"{i:05d}_{label}.png"}
            for i, (image, label) in enumerate(zip(images, labels, strict=True), start=first)]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"},
                "label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"image": pa.array(rows, image_type), "label": pa.array(labels, pa.int64())})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP, compression="snappy", use_dictionary=["label"])


def read_images(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What write_images wrote: images (N, 3, 32, 32) uint8 and labels (N,) int64."""
    table = pq.read_table(path)
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(table["label"].to_pylist())


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 on [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floats on [-1, 1] -> uint8 0..255, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def held_out_mask(num_images: int) -> torch.Tensor:
    """(N,) bool: the rows that neither network may see in training."""
    return torch.tensor([is_held_out(i) for i in range(num_images)])


# --- training -------------------------------------------------------------------------------------------------------


def shift_some(images: torch.Tensor, max_shift: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Moves `share` of images (B, C, H, W) on [-1, 1] by up to max_shift pixels each way, black at the edge."""
    num, _, height, width = images.shape
    offset = torch.randint(0, 2 * max_shift + 1, (num, 2), generator=generator)
    still = torch.rand(num, 1, generator=generator) >= share
    offset = torch.where(still, torch.full_like(offset, max_shift), offset)
    rows = offset[:, :1] + torch.arange(height)  # (B, H)
    columns = offset[:, 1:] + torch.arange(width)  # (B, W)
    padded = F.pad(images, (max_shift,) * 4, value=-1.0)
    batch = torch.arange(num)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (B, C, H, W)


def cosine_lr(step: int, num_steps: int, lr: float, warmup_steps: int = 50) -> float:
    """Linear warm-up, then half a cosine down to 1 % of lr."""
    return lr * min(1.0, (step + 1) / warmup_steps) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Moves ema towards model; faster in the first steps, so that the initial weights are soon forgotten."""
    decay = min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def new_vae(settings: VaeSettings) -> AutoencoderKL:
    """An untrained VAE, images (B, 3, 32, 32) to latents (B, 4, h, w), each level but the last halving the side.

    Without attention: so few positions need none.
    """
    levels = len(settings.block_out_channels)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=IMAGE_SIZE, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.block_out_channels, norm_num_groups=settings.norm_num_groups,
        mid_block_add_attention=False, scaling_factor=1.0)


def train_vae(images: torch.Tensor, settings: VaeSettings, seed: int) -> AutoencoderKL:
    """A VAE for images (N, 3, 32, 32) uint8: squared error plus the KL to N(0, I); returns the averaged weights.

    Plain AdamW in float32: no adversary and no perceptual loss, since blur is no matter at 8x8 real pixels.
    """
    torch.manual_seed(seed)  # weights and the posterior's draws
    generator = torch.Generator().manual_seed(seed)
    images = to_unit_range(images)
    model, ema = new_vae(settings), new_vae(settings)
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(settings.num_steps):
        set_lr(optimizer, cosine_lr(step, settings.num_steps, settings.lr))
        picked = torch.randint(0, len(images), (settings.batch_size,), generator=generator)
        x = shift_some(images[picked], settings.max_shift, settings.shift_share, generator)  # (B, 3, H, W)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            posterior = model.encode(x).latent_dist
            reconstruction = model.decode(posterior.sample()).sample.float()  # (B, 3, H, W)
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # nats per latent number
        kl_weight = settings.kl_weight * min(1.0, step / settings.kl_warmup_steps)
        loss = F.mse_loss(reconstruction, x) + kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, step, settings.ema_decay)
    return ema.eval().requires_grad_(False)


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKL, images: torch.Tensor, seed: int) -> None:
    """Writes the scale into the VAE's config that gives drawn latents of `images` (N, 3, 32, 32) uint8 unit std."""
    generator = torch.Generator().manual_seed(seed)
    latents = vae.encode(to_unit_range(images)).latent_dist.sample(generator)  # (N, C, h, w)
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """images (B, 3, 32, 32) on [-1, 1] there and back: by a drawn latent, or the mean if generator is None."""
    posterior = vae.encode(images).latent_dist
    return vae.decode(posterior.mode() if generator is None else posterior.sample(generator)).sample


def spoil(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blurs a quarter of images (B, 3, H, W) on [-1, 1] and adds noise to two fifths: what must not change a digit."""
    blurred = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, stride=1)
    chance, amount = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    noisy = 0.15 * amount * (torch.rand(len(images), 1, 1, 1, generator=generator) < 0.4)
    images = torch.where(chance < 0.25, blurred, images)
    return (images + noisy * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def train_features(images: torch.Tensor, labels: torch.Tensor, vae: AutoencoderKL, settings: FeatureSettings,
                   seed: int) -> SmallFeatures:
    """The feature network for images (N, 3, 32, 32) uint8, labels (N,); two fifths of its diet went through the VAE."""
    torch.manual_seed(seed)  # weights
    generator = torch.Generator().manual_seed(seed)
    images = to_unit_range(images)
    decoded = torch.stack([torch.cat([reconstruct(vae, part, generator).clamp(-1, 1) for part in images.split(2000)])
                           for _ in range(2)])  # (2, N, 3, H, W)
    model, ema, redraw = SmallFeatures(), SmallFeatures(), nn.Linear(NUM_POOL, 64)
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW([*model.parameters(), *redraw.parameters()], lr=settings.lr,
                                  weight_decay=settings.weight_decay)
    for step in range(settings.num_steps):
        set_lr(optimizer, cosine_lr(step, settings.num_steps, settings.lr))
        picked = torch.randint(0, len(images), (settings.batch_size,), generator=generator)
        variant = torch.randint(0, len(decoded), (settings.batch_size,), generator=generator)
        from_vae = torch.rand(settings.batch_size, 1, 1, 1, generator=generator) < 0.4
        x = torch.where(from_vae, decoded[variant, picked], images[picked])  # (B, 3, H, W)
        pair = shift_some(torch.cat([x, images[picked]], dim=1), settings.max_shift, 0.6, generator)  # moved alike
        x, clean = spoil(pair[:, :3], generator), pair[:, 3:4]  # (B, 3, H, W), (B, 1, H, W)
        features = model.features(x)
        drawn = redraw(features.pool).view(-1, 1, 8, 8)
        covariance = torch.cov(features.pool.T)  # (D, D)
        loss = (F.cross_entropy(features.logits, labels[picked], label_smoothing=settings.label_smoothing)
                + settings.shape_weight * F.mse_loss(drawn, F.avg_pool2d(clean, 4))
                + settings.whitening_weight * (covariance - torch.eye(NUM_POOL)).square().sum() / NUM_POOL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, model, step, settings.ema_decay)
    return ema.eval().requires_grad_(False)


# --- quality --------------------------------------------------------------------------------------------------------


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between Gaussians fitted to features (N, D) and (M, D): |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The trace of the root is the sum of the roots of S1 S2's eigenvalues, which are real and >= 0 but for rounding.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


@torch.no_grad()
def vae_quality(folder: Path, images: torch.Tensor, held_out: torch.Tensor, seed: int,
                max_error: float = 2e-3) -> tuple[list[Bar], str]:
    """Bars of the VAE in `folder`, read back from disk, and a table of its latents' distribution."""
    vae = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    generator = torch.Generator().manual_seed(seed)
    x = to_unit_range(images)
    unseen = x[held_out]
    latents = vae.encode(x).latent_dist.sample(generator) * vae.config.scaling_factor  # (N, C, h, w)
    channels = latents.transpose(0, 1).flatten(1)  # (C, N * h * w)
    mean, std = channels.mean(1), channels.std(1)
    kurtosis = ((channels - mean[:, None]) / std[:, None]).pow(4).mean(1)
    posterior_std = vae.encode(x).latent_dist.std.transpose(0, 1).flatten(1).mean(1) * vae.config.scaling_factor
    table = "\n".join(
        f"  latent channel {c}: mean {mean[c]:+.3f}, std {std[c]:.3f}, kurtosis {kurtosis[c]:.2f} (Gaussian 3), "
        f"of which posterior std {posterior_std[c]:.3f}" for c in range(len(mean)))
    size = sum(f.stat().st_size for f in folder.iterdir())
    return [
        Bar("vae held-out MSE, mean", F.mse_loss(reconstruct(vae, unseen, None), unseen).item(), high=max_error),
        Bar("vae held-out MSE, sample", F.mse_loss(reconstruct(vae, unseen, generator), unseen).item(), high=max_error),
        Bar("vae latent std, training images", latents[~held_out].std().item(), 0.95, 1.05),
        Bar("vae latent std, held-out images", latents[held_out].std().item(), 0.95, 1.05),
        Bar("vae scaling_factor", vae.config.scaling_factor),
        Bar("vae MB", size / 1e6, high=1.0),
    ], table


@torch.no_grad()
def features_quality(path: Path, vae_folder: Path, images: torch.Tensor, labels: torch.Tensor, held_out: torch.Tensor,
                     seed: int, min_accuracy: float = 0.98) -> list[Bar]:
    """Bars of the feature network at `path`, read back from disk."""
    network = load_small_features(weights=path)
    vae = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False).eval()
    generator = torch.Generator().manual_seed(seed)
    decoded = to_uint8(reconstruct(vae, to_unit_range(images), generator))
    real, fake = network(images), network(decoded)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(real.pool.T.double()))
    order = torch.randperm(len(images), generator=generator)
    half = len(order) // 2

    def accuracy(logits: torch.Tensor) -> float:
        return (logits.argmax(1) == labels)[held_out].float().mean().item()

    return [
        Bar("features held-out accuracy", accuracy(real.logits), low=min_accuracy),
        Bar("features held-out accuracy through the VAE", accuracy(fake.logits), low=min_accuracy),
        Bar("cov(pool), smallest / largest eigenvalue", (eigenvalues[0] / eigenvalues[-1]).item(), low=1e-5),
        Bar("cov(pool), effective rank", (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item(), low=10),
        Bar("frechet distance, two halves of the real images",
            frechet_distance(real.pool[order[:half]], real.pool[order[half:]])),
        Bar("frechet distance, real and through the VAE", frechet_distance(real.pool, fake.pool)),
        Bar("frechet distance, real and one class missing", frechet_distance(real.pool, real.pool[labels != 3])),
        Bar("features MB", path.stat().st_size / 1e6, high=0.5),
    ]


def format_bars(bars: Iterable[Bar]) -> str:
    """One line a bar: its value, its bounds if it has any, and whether it holds."""
    lines = []
    for bar in bars:
        bounds = [f">= {bar.low:g}"] * math.isfinite(bar.low) + [f"<= {bar.high:g}"] * math.isfinite(bar.high)
        verdict = f"{'ok' if bar.passed else 'MISSED'} ({', '.join(bounds)})" if bounds else ""
        lines.append(f"  {bar.name:54s} {bar.value:10.5f}  {verdict}".rstrip())
    return "\n".join(lines)


# --- main -----------------------------------------------------------------------------------------------------------


def build(output: Path, seed: int) -> None:
    """Writes digits.parquet, vae/ and features.safetensors into `output`. The README.md there is written by hand."""
    output.mkdir(parents=True, exist_ok=True)
    write_images(output / "digits.parquet", *draw_digits(), [str(c) for c in range(NUM_CLASSES)])
    images, labels = read_images(output / "digits.parquet")
    training = ~held_out_mask(len(images))
    train_networks(output, images[training], labels[training], VaeSettings(), FeatureSettings(), seed)


def train_networks(output: Path, images: torch.Tensor, labels: torch.Tensor, vae_settings: VaeSettings,
                   feature_settings: FeatureSettings, seed: int) -> None:
    """vae/ and features.safetensors into `output`, from images (N, 3, 32, 32) uint8 and labels (N,)."""
    output.mkdir(parents=True, exist_ok=True)
    vae = train_vae(images, vae_settings, seed).half().float()  # shipped as float16: measure what is shipped
    set_scaling_factor(vae, images[:MAX_FOR_SCALE], seed)
    vae.half().save_pretrained(output / "vae")
    network = train_features(images, labels, vae.float(), feature_settings, seed)
    save_file(network.state_dict(), output / "features.safetensors")
    for file in output.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors may leave them readable by their owner alone


def check(output: Path, seed: int) -> tuple[list[Bar], str]:
    """Reads everything in `output` back from disk and measures it."""
    parquet = output / "digits.parquet"
    images, labels = read_images(parquet)
    held_out = held_out_mask(len(images))
    bars = [Bar("digits.parquet images", len(images), 1797, 1797),
            Bar("digits.parquet MB", parquet.stat().st_size / 1e6, high=1.0)]
    vae_bars, table = vae_quality(output / "vae", images, held_out, seed)
    feature_bars = features_quality(output / "features.safetensors", output / "vae", images, labels, held_out, seed)
    return bars + vae_bars + feature_bars, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DIGITS, metavar="DIR", help="default: the package's own folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="measure what is there and build nothing")
    # One thread: on two cores shared with another process, two threads wait for each other and run 20 times slower.
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    if not args.check:
        build(args.output, args.seed)
    bars, table = check(args.output, args.seed + 1)
    print(f"{args.output} ({time.perf_counter() - start:.0f} s)\n{format_bars(bars)}\n{table}")
    return 0 if all(bar.passed for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
