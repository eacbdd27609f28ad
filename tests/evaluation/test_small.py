"""The embedded assets: their sizes, their layout, and the quality on images neither network was trained on."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from mdt_ray.data.sources import DIGITS
from mdt_ray.evaluation.small import SmallFeatures, is_held_out, load_small_features

NUM_IMAGES = 1797


@pytest.fixture(scope="module")
def table():
    return pq.read_table(DIGITS / "digits.parquet")


@pytest.fixture(scope="module")
def images(table):
    """(N, 3, 32, 32) uint8."""
    decoded = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def labels(table):
    return torch.tensor(table["label"].to_pylist())


@pytest.fixture(scope="module")
def held_out():
    return torch.tensor([is_held_out(i) for i in range(NUM_IMAGES)])


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(DIGITS / "vae", low_cpu_mem_usage=False).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def features():
    return load_small_features()


def size_of(path):
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))


@pytest.mark.parametrize(("name", "limit_bytes"),
                         [("digits.parquet", 1_000_000), ("vae", 1_000_000), ("features.safetensors", 500_000)])
def test_assets_are_small(name, limit_bytes):
    assert 0 < size_of(DIGITS / name) < limit_bytes


def test_readme_names_the_source_and_its_licence():
    text = (DIGITS / "README.md").read_text()
    for word in ("Alpaydin", "Kaynak", "CC BY 4.0", "UCI"):
        assert word in text


def test_parquet_has_the_layout_of_imagenet(table):
    assert table.num_rows == NUM_IMAGES
    assert str(table.schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert str(table.schema.field("label").type) == "int64"
    paths = [row["path"] for row in table["image"].to_pylist()]
    assert len(set(paths)) == NUM_IMAGES
    assert paths[7] == f"00007_{table['label'][7].as_py()}.png"


def test_parquet_is_cut_into_row_groups():
    metadata = pq.read_metadata(DIGITS / "digits.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [64] * 28 + [5]


def test_images_are_white_digits_on_black(images, labels):
    assert images.shape == (NUM_IMAGES, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images.amin() == 0
    assert images.amax() == 255
    assert images[:, :, :, 0].float().mean() < 10  # the left edge is empty
    assert torch.equal(images[:, 0], images[:, 2])
    assert torch.bincount(labels).min() >= 170
    assert len(torch.bincount(labels)) == 10


def test_a_fifth_is_held_out(held_out, labels):
    assert held_out.sum() == 360
    assert torch.bincount(labels[held_out], minlength=10).min() >= 20


def test_vae_reconstructs_held_out_images(vae, images, held_out):
    x = images[held_out].float() / 127.5 - 1
    posterior = vae.encode(x).latent_dist
    assert posterior.mean.shape == (360, 4, 4, 4)
    assert vae.dtype == torch.float32
    assert F.mse_loss(vae.decode(posterior.mode()).sample, x) < 2e-3
    drawn = posterior.sample(torch.Generator().manual_seed(0))
    assert F.mse_loss(vae.decode(drawn).sample, x) < 2e-3


def test_scaled_latents_have_unit_std(vae, images):
    x = images.float() / 127.5 - 1
    latents = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0)) * vae.config.scaling_factor
    assert abs(latents.std() - 1) < 0.05
    assert latents.mean((0, 2, 3)).abs().max() < 0.1


def test_features_know_held_out_digits(features, images, labels, held_out):
    answer = features(images[held_out])
    assert answer.pool.shape == (360, 64)
    assert answer.spatial.shape == (360, 128)
    assert answer.logits.shape == (360, 10)
    assert {f.dtype for f in answer} == {torch.float32}
    assert (answer.logits.argmax(1) == labels[held_out]).float().mean() >= 0.98


def test_features_know_digits_through_the_vae(features, vae, images, labels, held_out):
    x = images[held_out].float() / 127.5 - 1
    drawn = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0))
    decoded = ((vae.decode(drawn).sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert (features(decoded).logits.argmax(1) == labels[held_out]).float().mean() >= 0.98


def test_pool_has_full_rank(features, images):
    """A dead unit or one direction with all the variance would make the Frechet distance blind."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(features(images).pool.T.double()))
    assert eigenvalues[0] > 1e-5 * eigenvalues[-1]
    assert eigenvalues.sum() ** 2 / eigenvalues.square().sum() > 10


def test_features_do_not_depend_on_the_batch(features, images):
    whole = features(images[:64])
    alone = [features(images[i:i + 1]) for i in range(3)]
    for name in whole._fields:
        torch.testing.assert_close(getattr(whole, name)[:3], torch.cat([getattr(one, name) for one in alone]),
                                   rtol=0, atol=1e-4)


def test_features_are_frozen_and_named(features):
    assert features.name == "digits"
    assert not features.training
    assert not any(p.requires_grad for p in features.parameters())


@pytest.mark.parametrize(("images", "message"), [
    (torch.zeros(2, 3, 32, 32), "dtype torch.float32"),
    (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), r"\(2, 1, 32, 32\)"),
    (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), r"\(2, 3, 28, 28\)"),
    (torch.zeros(3, 32, 32, dtype=torch.uint8), r"\(3, 32, 32\)"),
])
def test_features_refuse_other_inputs(images, message):
    with pytest.raises(ValueError, match=message):
        SmallFeatures()(images)
