"""What a run tells: rows of metrics, and the loss on held-out images with fixed noise."""

import dataclasses

import numpy as np
import pytest
import torch

from mdt_ray import checkpoints
from mdt_ray.data import latents
from mdt_ray.data.latent_reader import LatentReader
from mdt_ray.diffusion import q_sample, training_losses
from mdt_ray.training.meters import MACHINE_COLUMNS, Meters
from mdt_ray.training.validation import TIMESTEPS, Validation
from tests.helpers import make_latents, tiny_training
from tests.training.test_faults import run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    make_latents(folder, num_images=400)
    return folder


# Rows


def test_rows_hold_what_a_person_watches(folder, tmp_path):
    history = run(tiny_training(folder, tmp_path, log_every_steps=5, validate_every_steps=10)).history
    assert [row["step"] for row in history] == [5, 10, 15, 20]
    for row in history:
        assert row["images_seen"] == row["step"] * 24
        assert row["loss"] == pytest.approx(row["loss_full"] + row["loss_masked"])
        assert {f"loss_{name}_q{i}" for name in ("full", "masked") for i in (1, 2, 3, 4)} <= row.keys()
        assert all(row[name] >= 0 for name in (*MACHINE_COLUMNS, "grad_norm"))
        assert row["share_waiting"] <= 1
        assert 0.05 < row["memory_gb"] < 20
        assert ("val_loss" in row) == (row["step"] % 10 == 0)
    assert history[0]["seconds_left"] > 0 == history[-1]["seconds_left"]
    assert checkpoints.read_metrics(str(tmp_path / "metrics.parquet")) == history


def test_quartiles_of_t_by_hand():
    meters = Meters(CPU, tiny_training("a", "b", batch_size=12))
    t = torch.tensor([0, 249, 250, 499, 500, 999])
    meters.add(t, {"full": torch.tensor([1.0, 3, 5, 7, 9, 11])})
    meters.add(t[:2], {"full": torch.tensor([5.0, 7])})
    meters.add(t[:4], {"full": torch.tensor([0.0, 0, 0, 0])})
    meters.add_step(torch.tensor(2.0), torch.tensor(0.0))
    row = meters.collect(steps_left=0)
    assert row["loss_full"] == pytest.approx((36 + 12) / 12)
    assert [row[f"loss_full_q{i}"] for i in (1, 2, 3, 4)] == pytest.approx([16 / 6, 12 / 4, 9, 11])


# Validation


def loss_of(folder, model, rank=0, world_size=1) -> dict:
    return Validation(str(folder), latents.open_manifest(str(folder)), rank, world_size, CPU, None).loss(model)


def test_the_validation_loss_by_hand(folder, tmp_path):
    """The mean over held-out images and eight timesteps of the full pass; equal every time it is asked."""
    model = run(tiny_training(folder, tmp_path, num_steps=3)).ema
    found = loss_of(folder, model)
    assert found == loss_of(folder, model)
    assert TIMESTEPS == (62, 188, 312, 438, 562, 688, 812, 938)
    assert found["val_loss"] == pytest.approx(np.mean([found[f"val_loss_t{t:03d}"] for t in TIMESTEPS]))
    manifest = latents.open_manifest(str(folder))
    validation = Validation(str(folder), manifest, 0, 1, CPU, None)
    reader = LatentReader(str(folder), manifest, max_groups=1, split="validation")
    assert validation.num_images == sum(reader.group_sizes) == manifest.num_rows - manifest.num_train
    x_0, eps, y = validation._batch(slice(0, 3))
    moments, labels = reader.read(np.arange(3))
    assert (x_0 - torch.from_numpy(moments[:, 0]).float()).abs().max() < 5 * 0.05 + 1e-3  # the posterior's std
    assert y.tolist() == labels.tolist()
    assert abs(eps.mean()) < 0.1 > abs(eps.std() - 1)
    t = torch.full((3,), 938)
    x_t = q_sample(x_0, t, eps[:, 7])
    expected = training_losses(model(x_t, t, y), x_0, x_t, eps[:, 7], t, None)["loss"].sum()
    for name in ("numbers", "mean", "std", "labels"):
        setattr(validation, name, getattr(validation, name)[:3])
    validation.num_images = 3
    assert validation.loss(model)["val_loss_t938"] == pytest.approx(expected.item() / 3)


def test_ranks_share_the_held_out_images(folder, tmp_path):
    model = run(tiny_training(folder, tmp_path, num_steps=3)).ema
    parts = [Validation(str(folder), latents.open_manifest(str(folder)), rank, 3, CPU, None) for rank in range(3)]
    count = parts[0].num_images
    assert sorted(i for part in parts for i in part.numbers) == list(range(count))
    assert sum(part.loss(model)["val_loss"] for part in parts) == pytest.approx(loss_of(folder, model)["val_loss"], rel=1e-6)


def test_validation_is_far_less_noisy_than_training(folder, tmp_path):
    """Of a model that hardly changes, the validation loss hardly moves where the training loss does."""
    config = tiny_training(folder, tmp_path, num_steps=20, validate_every_steps=1)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-6))
    history = run(config).history
    spread = {name: np.std([row[name] for row in history]) for name in ("val_loss", "loss_full")}
    assert spread["val_loss"] * 20 < spread["loss_full"]


def test_validation_falls_as_the_model_learns_and_changes_no_step(folder, tmp_path):
    runs = [run(tiny_training(folder, tmp_path / str(every), num_steps=40, validate_every_steps=every)) for every in (0, 20)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True))
    values = [row["val_loss"] for row in runs[1].history if "val_loss" in row]
    assert len(values) == 2
    assert values[1] < values[0]


def test_latents_without_held_out_images_give_no_validation_loss(tmp_path, caplog):
    make_latents(tmp_path / "latents", validation_share=0.0)
    history = run(tiny_training(tmp_path / "latents", tmp_path, num_steps=2, validate_every_steps=1)).history
    assert "val_loss" not in history[-1]
    assert "no validation loss: the latents hold out no image" in caplog.text
