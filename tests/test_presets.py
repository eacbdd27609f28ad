"""Presets: the published recipes by their numbers, what a fast one changes, and that all of them can be built."""

import itertools
import re

import pytest
import torch

from mdt_ray import config_io, presets
from mdt_ray.config import TrainConfig
from mdt_ray.training.step import build_model

BARE = [name for name in presets.PRESETS if name.startswith("imagenet") and not name.endswith("-fast")]


def train(name: str) -> TrainConfig:
    return presets.preset(name).train


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_presets_are_valid_and_complete(name):
    config = presets.preset(name)
    assert config.train.latents == config.precompute.output
    assert config.train.optim.lr > 0
    assert config.output == f"runs/{name}"
    latent = {"model.input_size": config.train.model.input_size or 32, "model.in_channels": 4}
    with torch.device("meta"):
        build_model(config_io.override(config.train, latent).model)


def test_the_overview_names_every_preset():
    names = set()
    for text in presets.OVERVIEW:
        parts = [part.split(",") for part in re.split(r"[{}]", text)]
        names |= {"".join(choice) for choice in itertools.product(*parts)}
    assert names == presets.PRESETS.keys()
    assert len(names) == 2 + 2 * 3 * 4 * 4


@pytest.mark.parametrize("name", [name for name in BARE if "v2" not in name])
def test_the_recipe_of_the_paper(name):
    """Section 5.1: AdamW, 256 images, no weight decay, mask ratio 0.3, N2 = 2; "other settings are also aligned with DiT",
    whose section 4 has a constant rate, no warm-up, EMA 0.9999, and labels dropped with 0.1. Both ran in float32, with TF32
    products on their A100."""
    c = train(name)
    assert (c.optim.name, c.optim.weight_decay, c.optim.clip_norm) == ("adamw", 0.0, None)
    assert (c.optim.warmup_steps, c.optim.schedule) == (0, "constant")
    assert (c.batch_size, c.precision, c.ema.decay, c.ema.warmup) == (256, "tf32", 0.9999, False)
    assert (c.model.class_dropout_prob, c.model.decode_layer, c.loss.passes) == (0.1, 2, "full+masked")
    assert (c.loss.mask_ratio, c.loss.mask_ratio_span, c.loss.min_snr_gamma) == (0.3, 0.0, None)
    assert c.flip, "with p = 0.5"
    # DiT section 4: 1e-4. MDT section 5.1: 3e-4.
    assert c.optim.lr == (1e-4 if c.model.kind == "dit" else 3e-4)


@pytest.mark.parametrize(("name", "decode_layer", "lr"), [
    ("s", 6, 5e-4), ("xl", 4, 3e-4)])
def test_the_recipe_of_mdtv2(name, decode_layer, lr):
    """Its published settings for S and XL: deeper decoder, ratio from [0.3, 0.5], min-SNR 5, Adan with clipping."""
    c = train(f"imagenet256-v2-{name}-2")
    assert (c.model.kind, c.model.decode_layer) == ("mdt_v2", decode_layer)
    assert (c.loss.mask_ratio, c.loss.mask_ratio_span, c.loss.min_snr_gamma) == (0.3, 0.2, 5.0)
    assert (c.optim.name, c.optim.lr, c.optim.clip_norm, c.optim.weight_decay) == ("adan", lr, 1.0, 0.0)
    assert (c.batch_size, c.ema.decay, c.optim.warmup_steps, c.precision) == (256, 0.9999, 0, "tf32")


@pytest.mark.parametrize(("name", "steps"), [
    ("s-2", 3_500_000), ("b-2", 3_500_000),  # Table 2, their last rows
    ("xl-2", 6_500_000),  # Table 1
    ("dit-s-2", 400_000), ("dit-b-2", 400_000), ("dit-xl-2", 7_000_000),  # Table 2
    ("l-2", 400_000), ("v2-xl-2", 400_000),  # not in the paper
])
def test_runs_are_as_long_as_the_longest_published(name, steps):
    assert train(f"imagenet256-{name}").num_steps == steps


@pytest.mark.parametrize("name", BARE)
def test_what_a_fast_recipe_changes_and_nothing_else(name):
    published, fast = train(name), train(f"{name}-fast")
    changes = {
        "precision": "bf16", "batch_size": 1024, "accumulation": 4, "num_steps": published.num_steps // 4,
        "ema.decay": 0.9996,
        "optim.lr": 2 * published.optim.lr, "optim.warmup_steps": 2000, "optim.clip_norm": 1.0,
        "output": f"runs/{name}-fast/train"}
    assert config_io.override(published, changes) == fast
    assert fast.num_steps * fast.batch_size == published.num_steps * published.batch_size
    assert presets.preset(f"{name}-fast").tune.train == fast


def test_where_training_mirrors_precompute_encodes_mirror_images():
    for config in map(presets.preset, presets.PRESETS):
        assert config.train.flip == config.tune.train.flip == config.precompute.flip
    assert not presets.digits().train.flip, "a mirrored digit is no digit"


def test_the_plan_of_a_preset_has_its_settings_and_the_size_of_its_data():
    plan = presets.plan_of(presets.preset("imagenet256-s-2"))
    shared = config_io.to_dict(train("imagenet256-s-2"))
    assert shared.items() <= config_io.to_dict(plan).items()
    assert plan.num_images == 1_281_167
    assert presets.plan_of(presets.digits()).num_images == 1797


def test_unknown_preset_suggests():
    with pytest.raises(ValueError, match="unknown preset 'digts'; did you mean 'digits'"):
        presets.preset("digts")
