"""Named settings for all four jobs; each number names its source."""

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


def _imagenet256(name: str, model: ModelConfig) -> QuickstartConfig:
    """The paper's recipe (section 5.1): AdamW 3e-4 constant, batch 256, no decay, EMA 0.9999, mask ratio 0.3."""
    root = f"runs/imagenet256-{name}"
    training = TrainConfig(latents="runs/imagenet256/latents", output=f"{root}/train", model=model, precision="bf16",
                           workers=WorkersConfig(num_workers=8, cpus_per_worker=4, gpus_per_worker=1))
    evaluation = EvaluateConfig(checkpoint=f"{root}/train", output=f"{root}/evaluate",
                                workers=WorkersConfig(num_workers=8, cpus_per_worker=4, gpus_per_worker=1))
    return QuickstartConfig(
        output=root, train=training, evaluate=evaluation,
        precompute=PrecomputeConfig(output="runs/imagenet256/latents", flip=True,
                                    workers=WorkersConfig(num_workers=8, cpus_per_worker=4, gpus_per_worker=1)),
        tune=TuneConfig(output=f"{root}/tune", train=training, evaluate=evaluation))


def _imagenet_model(hidden_size: int, depth: int, num_heads: int, kind: str = "mdt_v1") -> ModelConfig:
    """Latents 32x32x4, patch 2, decoder of 2 blocks, label dropout 0.1 (paper section 5.1 and Table 6)."""
    return ModelConfig(kind=kind, input_size=32, in_channels=4, num_classes=1000, hidden_size=hidden_size, depth=depth,
                       num_heads=num_heads)


def imagenet256_s_2() -> QuickstartConfig:
    """MDT-S/2: 12 blocks of width 384, 6 heads (paper Table 6)."""
    return _imagenet256("s-2", _imagenet_model(384, 12, 6))


def imagenet256_b_2() -> QuickstartConfig:
    """MDT-B/2: 12 blocks of width 768, 12 heads (paper Table 6)."""
    return _imagenet256("b-2", _imagenet_model(768, 12, 12))


def imagenet256_xl_2() -> QuickstartConfig:
    """MDT-XL/2: 28 blocks of width 1152, 16 heads (paper Table 6)."""
    return _imagenet256("xl-2", _imagenet_model(1152, 28, 16))


def imagenet256_dit_s_2() -> QuickstartConfig:
    """DiT-S/2, the baseline of paper Table 2."""
    return _imagenet256("dit-s-2", _imagenet_model(384, 12, 6, kind="dit"))


PRESETS: dict[str, Callable[[], QuickstartConfig]] = {
    "digits": digits,
    "imagenet256-s-2": imagenet256_s_2,
    "imagenet256-b-2": imagenet256_b_2,
    "imagenet256-xl-2": imagenet256_xl_2,
    "imagenet256-dit-s-2": imagenet256_dit_s_2,
}


def preset(name: str) -> QuickstartConfig:
    """The preset of that name. Raises ValueError naming the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{config_io.suggestion(name, PRESETS)}")
    return PRESETS[name]()
