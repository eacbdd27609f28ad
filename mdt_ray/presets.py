"""Named settings for all four jobs; each number names its source."""

import functools
from collections.abc import Callable

from mdt_ray import config_io
from mdt_ray.config import (
    EmaConfig,
    EvaluateConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PrecomputeConfig,
    QuickstartConfig,
    SamplingConfig,
    TrainConfig,
    TuneConfig,
    VaeConfig,
    WorkersConfig,
)


def digits() -> QuickstartConfig:
    """The embedded data set: 1,797 handwritten digits, 10 classes, a model that learns them in minutes on two CPU cores."""
    latents, train, real = "runs/digits/latents", "runs/digits/train", "digits"
    precompute = PrecomputeConfig(
        source=real, output=latents, vae=VaeConfig(path="digits"), image_size=32, chunk_size=256, rows_per_group=64,
        validation_share=0.05, workers=WorkersConfig(num_workers=2))
    training = TrainConfig(
        latents=latents, output=train,
        # 16 tokens of a 4x4x4 latent; 1.2M parameters.
        model=ModelConfig(input_size=4, in_channels=4, num_classes=10, patch_size=1, hidden_size=96, depth=6, num_heads=4),
        loss=LossConfig(mask_ratio=0.3),  # paper Table 3
        # Over ten times the published rate: the model is small and the run short (measured: 2e-3 ends at a third more FID).
        optim=OptimConfig(lr=4e-3, warmup_steps=100, schedule="cosine", schedule_steps=2000, clip_norm=1.0),
        ema=EmaConfig(decay=0.998, warmup=True),
        batch_size=96, num_lanes=16, num_steps=2000, log_every_steps=25, checkpoint_every_steps=250,
        keep_every_steps=500, workers=WorkersConfig(num_workers=2))
    evaluation = EvaluateConfig(
        checkpoint=train, output="runs/digits/evaluate", reference=real, num_samples=1000, chunk_size=100,
        sampling=SamplingConfig(sampler="dpm-solver++", num_sampling_steps=25, cfg_scale=3.0), labels="balanced",
        workers=WorkersConfig(num_workers=2))
    trial = TrainConfig(
        latents=latents, model=training.model, loss=training.loss, ema=EmaConfig(decay=0.99, warmup=True),
        optim=OptimConfig(lr=4e-3, warmup_steps=25, schedule="cosine", schedule_steps=150, clip_norm=1.0),
        batch_size=96, num_lanes=16, num_steps=150, log_every_steps=25, checkpoint_every_steps=75, keep_last=1)
    sweep = TuneConfig(
        output="runs/digits/tune", train=trial, max_concurrent_trials=2,
        evaluate=EvaluateConfig(
            reference=real, num_samples=300, chunk_size=300, keep_images=0, labels="balanced",
            sampling=SamplingConfig(sampler="dpm-solver++", num_sampling_steps=15)))
    return QuickstartConfig(output="runs/digits", precompute=precompute, train=training, tune=sweep, evaluate=evaluation)


SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
"""Width, blocks, heads (paper Table 6; L is DiT's and not in the paper)."""
PATCHES = (1, 2, 4, 8)
V2_DECODE_LAYER = {"s": 6, "b": 6, "l": 4, "xl": 4}
"""Published for S and XL; B as S, which is as deep, L as XL."""
V2_LR = {"s": 5e-4, "b": 5e-4, "l": 3e-4, "xl": 3e-4}


def imagenet256(kind: str, size: str, patch_size: int) -> QuickstartConfig:
    """ImageNet at 256 pixels with a model of `kind` (mdt_v1, mdt_v2, dit), one of SIZES, and one of PATCHES.

    v1 is the paper's recipe (section 5.1): AdamW 3e-4 constant, batch 256, no decay, EMA 0.9999, mask ratio 0.3, N2 = 2. DiT
    runs by the same (paper Table 2). v2 is MDTv2's: Adan, clipped, ratio in [0.3, 0.5], min-SNR 5. Side and channels of the
    latents come from the latents, so that any autoencoder will do.
    """
    width, depth, heads = SIZES[size]
    v2 = kind == "mdt_v2"
    name = _name(kind, size, patch_size)
    root = f"runs/{name}"
    workers = WorkersConfig(num_workers=8, cpus_per_worker=4, gpus_per_worker=1)
    training = TrainConfig(
        latents="runs/imagenet256/latents", output=f"{root}/train", precision="bf16", workers=workers,
        flip=True,  # p = 0.5, as ADM and DiT
        model=ModelConfig(kind=kind, num_classes=1000, patch_size=patch_size, hidden_size=width, depth=depth,
                          num_heads=heads, decode_layer=V2_DECODE_LAYER[size] if v2 else 2),
        loss=LossConfig(mask_ratio=0.3, mask_ratio_span=0.2, min_snr_gamma=5.0) if v2 else LossConfig(mask_ratio=0.3),
        optim=OptimConfig(name="adan", lr=V2_LR[size], clip_norm=1.0) if v2 else OptimConfig(lr=3e-4))
    evaluation = EvaluateConfig(checkpoint=f"{root}/train", output=f"{root}/evaluate", workers=workers)
    return QuickstartConfig(
        output=root, train=training, evaluate=evaluation,
        precompute=PrecomputeConfig(output="runs/imagenet256/latents", flip=True, workers=workers),
        tune=TuneConfig(output=f"{root}/tune", train=training, evaluate=evaluation))


def _name(kind: str, size: str, patch_size: int) -> str:
    return f"imagenet256-{ {'mdt_v1': '', 'mdt_v2': 'v2-', 'dit': 'dit-'}[kind] }{size}-{patch_size}"


PRESETS: dict[str, Callable[[], QuickstartConfig]] = {"digits": digits} | {
    _name(kind, size, patch_size): functools.partial(imagenet256, kind, size, patch_size)
    for kind in ("mdt_v1", "mdt_v2", "dit") for size in SIZES for patch_size in PATCHES}

OVERVIEW = {
    "digits": "the embedded handwritten digits, minutes on two CPU cores",
    "imagenet256-{s,b,l,xl}-{1,2,4,8}": "MDT of the paper, by size and patch: imagenet256-s-2",
    "imagenet256-v2-{s,b,l,xl}-{1,2,4,8}": "MDTv2",
    "imagenet256-dit-{s,b,l,xl}-{1,2,4,8}": "DiT, the baseline",
}
"""For people: the names of PRESETS, families joined."""


def preset(name: str) -> QuickstartConfig:
    """The preset of that name. Raises ValueError naming the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{config_io.suggestion(name, PRESETS)}")
    return PRESETS[name]()
