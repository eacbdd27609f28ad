"""Named settings for all four jobs; each number names its source."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

from mdt_ray import config_io
from mdt_ray.config import (
    NUM_IMAGENET_IMAGES,
    EmaConfig,
    EvaluateConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    PrecomputeConfig,
    QuickstartConfig,
    SamplingConfig,
    SweepConfig,
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
    drawn = EvaluateConfig(
        extractor="digits", num_samples=1000, chunk_size=100, labels="balanced",
        sampling=SamplingConfig(sampler="dpm-solver++", num_sampling_steps=25, cfg_scale=3.0))
    training = TrainConfig(
        latents=latents, output=train, samples=dataclasses.replace(drawn, keep_images=64),
        # 16 tokens of a 4x4x4 latent; 1.2M parameters.
        model=ModelConfig(input_size=4, in_channels=4, num_classes=10, patch_size=1, hidden_size=96, depth=6, num_heads=4),
        loss=LossConfig(mask_ratio=0.3),  # paper Table 3
        # Over ten times the published rate: the model is small and the run short (measured: 2e-3 ends at a third more FID).
        optim=OptimConfig(lr=4e-3, warmup_steps=100, schedule="cosine", schedule_steps=2000, clip_norm=1.0),
        ema=EmaConfig(decay=0.998, warmup=True),
        batch_size=96, num_lanes=16, num_steps=2000, log_every_steps=25, checkpoint_every_steps=250, validate_every_steps=50,
        keep_every_steps=500, workers=WorkersConfig(num_workers=2))
    evaluation = dataclasses.replace(drawn, checkpoint=train, output="runs/digits/evaluate", reference=real,
                                     workers=WorkersConfig(num_workers=2))
    trial = TrainConfig(
        latents=latents, model=training.model, loss=training.loss, ema=EmaConfig(decay=0.99, warmup=True),
        optim=OptimConfig(lr=4e-3, warmup_steps=25, schedule="cosine", schedule_steps=150, clip_norm=1.0),
        batch_size=96, num_lanes=16, num_steps=150, log_every_steps=25, checkpoint_every_steps=75, keep_last=1)
    sweep = TuneConfig(
        output="runs/digits/tune", train=trial,
        evaluate=EvaluateConfig(
            reference=real, extractor="digits", num_samples=300, chunk_size=300, keep_images=20, labels="balanced",
            sampling=SamplingConfig(sampler="dpm-solver++", num_sampling_steps=15)))
    return QuickstartConfig(output="runs/digits", precompute=precompute, train=training, tune=sweep, evaluate=evaluation)


def fashion() -> QuickstartConfig:
    """Fashion-MNIST: 70,000 pictures of clothes, 10 classes (`scripts/make_fashion.py` writes them), and a model of 64
    tokens: two CPU cores do a sweep of docs/ablations.md in an hour."""
    real, latents = "runs/fashion/images", "runs/fashion/latents"
    precompute = PrecomputeConfig(
        source=real, output=latents, vae=VaeConfig(path="fashion"), image_size=32, chunk_size=5000, rows_per_group=128,
        workers=WorkersConfig(num_workers=2))
    drawn = EvaluateConfig(
        extractor="fashion", num_samples=2000, chunk_size=1000, labels="balanced", keep_images=40, reference=real,
        sampling=SamplingConfig(sampler="dpm-solver++", num_sampling_steps=15))
    training = TrainConfig(
        latents=latents, output="runs/fashion/train",
        # 64 tokens of a 4x8x8 latent; 1.2M parameters.
        model=ModelConfig(input_size=8, in_channels=4, num_classes=10, patch_size=1, hidden_size=96, depth=6, num_heads=4),
        loss=LossConfig(mask_ratio=0.3),  # paper Table 3
        # Constant, as published, so that checkpoints on the way are results too.
        optim=OptimConfig(lr=2e-3, warmup_steps=50, clip_norm=1.0), ema=EmaConfig(decay=0.995, warmup=True),
        batch_size=96, num_lanes=16, num_steps=1200, log_every_steps=20, checkpoint_every_steps=200, keep_last=1,
        keep_every_steps=200, validate_every_steps=200)
    evaluation = dataclasses.replace(drawn, checkpoint=training.output, output="runs/fashion/evaluate",
                                     workers=WorkersConfig(num_workers=2))
    return QuickstartConfig(
        output="runs/fashion", precompute=precompute, train=training, evaluate=evaluation,
        tune=TuneConfig(output="runs/fashion/tune", train=dataclasses.replace(training, output=""), evaluate=drawn))


SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
"""Width, blocks, heads (paper Table 6; L is DiT's and not in the paper)."""
PATCHES = (1, 2, 4, 8)
V2_DECODE_LAYER = {"s": 6, "b": 6, "l": 4, "xl": 4}
"""Published for S and XL; B as S, which is as deep, L as XL."""
V2_LR = {"s": 5e-4, "b": 5e-4, "l": 3e-4, "xl": 3e-4}
"""As V2_DECODE_LAYER."""
NUM_STEPS = {
    ("mdt_v1", "s", 2): 3_500_000,  # paper Table 2: FID 41.37 (and on the way 300k 57.01, 400k 53.46, 2000k 44.14)
    ("mdt_v1", "b", 2): 3_500_000,  # paper Table 2: 20.45 (400k 34.33)
    ("mdt_v1", "xl", 2): 6_500_000,  # paper Table 1: 6.23, guided 1.79 (Table 2: 400k 16.42, 1300k 9.60, 3500k 6.65)
    ("dit", "xl", 2): 7_000_000,  # paper Table 2: 9.62 (400k 19.47)
}
"""The longest published run of a model; a shorter one is the same run, stopped."""
OTHER_NUM_STEPS = 400_000
"""Where none is published here: the length at which paper Table 2 and DiT (arXiv 2212.09748) compare all models."""


def imagenet256(kind: str, size: str, patch_size: int, fast: bool = False) -> QuickstartConfig:
    """ImageNet at 256 pixels with a model of `kind` (mdt_v1, mdt_v2, dit), one of SIZES, and one of PATCHES.

    The published recipe, or what `faster` makes of it. v1 (paper section 5.1, "other settings aligned with DiT"): AdamW 3e-4
    constant, no decay, no warm-up, batch 256, EMA 0.9999, label dropout 0.1, mask ratio 0.3, N2 = 2, float32 with TF32
    products. DiT (arXiv 2212.09748 section 4) is the same with 1e-4. v2 is MDTv2's: Adan, clipped at 1, ratio in [0.3, 0.5],
    min-SNR 5. Side and channels of the latents come from the latents, so that any autoencoder will do.
    """
    width, depth, heads = SIZES[size]
    v2 = kind == "mdt_v2"
    name = _name(kind, size, patch_size, fast)
    root = f"runs/{name}"
    workers = WorkersConfig(num_workers=8, cpus_per_worker=4, gpus_per_worker=1)
    training = TrainConfig(
        latents="runs/imagenet256/latents", output=f"{root}/train", precision="tf32", workers=workers,
        num_steps=NUM_STEPS.get((kind, size, patch_size), OTHER_NUM_STEPS),
        flip=True,  # p = 0.5, as ADM and DiT
        model=ModelConfig(kind=kind, num_classes=1000, patch_size=patch_size, hidden_size=width, depth=depth,
                          num_heads=heads, decode_layer=V2_DECODE_LAYER[size] if v2 else 2),
        loss=LossConfig(mask_ratio=0.3, mask_ratio_span=0.2, min_snr_gamma=5.0) if v2 else LossConfig(mask_ratio=0.3),
        optim=(OptimConfig(name="adan", lr=V2_LR[size], clip_norm=1.0) if v2
               else OptimConfig(lr=1e-4 if kind == "dit" else 3e-4)))
    training = faster(training) if fast else training
    evaluation = EvaluateConfig(checkpoint=f"{root}/train", output=f"{root}/evaluate", workers=workers)
    return QuickstartConfig(
        output=root, train=training, evaluate=evaluation,
        precompute=PrecomputeConfig(output="runs/imagenet256/latents", flip=True, workers=workers),
        tune=TuneConfig(output=f"{root}/tune", train=training, evaluate=fewer(evaluation)))


SCALE = 4
"""Of the batch in a fast recipe: 1024, as U-ViT's in paper Table 1."""


def faster(published: TrainConfig) -> TrainConfig:
    """The same images in a quarter of the steps, in bf16. Nobody has measured an FID of it: rules, not results.

    Batch and rate are scaled by the rules for adaptive optimisers, which were shown for Adam and are assumed for Adan.
    """
    optim = dataclasses.replace(
        published.optim,
        lr=published.optim.lr * SCALE**0.5,  # square root of the batch's scale: arXiv 2205.10287
        warmup_steps=2000,  # 2 / (1 - beta_2) steps, with AdamW's beta_2 = 0.999: arXiv 1910.04209
        clip_norm=1.0)  # as MDTv2: a step's worth of harm at most, where bf16 or the higher rate makes a gradient leap
    return dataclasses.replace(
        published, optim=optim,
        precision="bf16",  # twice the peak of TF32 on A100 and H100, and activations of fewer bytes
        batch_size=published.batch_size * SCALE,
        accumulation=SCALE,  # no more images at once on a GPU than the published batch has; 1 where the memory allows
        num_steps=published.num_steps // SCALE,  # as many images
        # Averages as many images: arXiv 2307.13813.
        ema=dataclasses.replace(published.ema, decay=round(published.ema.decay**SCALE, 4)))


NUM_IMAGES = {"digits": 1797, "fashion": 70_000}
"""Of the small data sets, by extractor."""


def plan_of(preset: QuickstartConfig) -> PlanConfig:
    """The settings of `plan` for a preset: those of its training, and the size of its data set."""
    training = {f.name: getattr(preset.train, f.name) for f in dataclasses.fields(preset.train)}
    return PlanConfig(**training, num_images=NUM_IMAGES.get(preset.evaluate.extractor, NUM_IMAGENET_IMAGES))


def sweep_of(preset: QuickstartConfig) -> SweepConfig:
    """The settings of `evaluate sweep` for a preset: its evaluation with few images."""
    return SweepConfig(output=f"{preset.output}/sweep", evaluate=fewer(preset.evaluate))


def fewer(evaluation: EvaluateConfig) -> EvaluateConfig:
    """As many images as tell settings apart, where there are many to try."""
    return dataclasses.replace(evaluation, num_samples=min(evaluation.num_samples, 5000), keep_images=64)


def _name(kind: str, size: str, patch_size: int, fast: bool) -> str:
    family = {"mdt_v1": "", "mdt_v2": "v2-", "dit": "dit-"}[kind]
    return f"imagenet256-{family}{size}-{patch_size}{'-fast' if fast else ''}"


PRESETS: dict[str, Callable[[], QuickstartConfig]] = {"digits": digits, "fashion": fashion} | {
    _name(*choice): functools.partial(imagenet256, *choice)
    for choice in itertools.product(("mdt_v1", "mdt_v2", "dit"), SIZES, PATCHES, (False, True))}

OVERVIEW = {
    "digits": "the embedded handwritten digits, minutes on two CPU cores",
    "fashion": "Fashion-MNIST's clothes (scripts/make_fashion.py), 64 tokens, for ablations on two CPU cores",
    "imagenet256-{s,b,l,xl}-{1,2,4,8}{,-fast}": "MDT of the paper, by size and patch: imagenet256-s-2",
    "imagenet256-v2-{s,b,l,xl}-{1,2,4,8}{,-fast}": "MDTv2",
    "imagenet256-dit-{s,b,l,xl}-{1,2,4,8}{,-fast}": "DiT, the baseline",
}
"""For people: the names of PRESETS, families joined. Bare names are the published recipes."""


def preset(name: str) -> QuickstartConfig:
    """The preset of that name. Raises ValueError naming the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{config_io.suggestion(name, PRESETS, OVERVIEW)}")
    return PRESETS[name]()
