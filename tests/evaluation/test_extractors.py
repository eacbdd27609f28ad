"""The table of extractors: each by name, with its own weights or others, and the hash of the file it takes."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from mdt_ray import storage
from mdt_ray.data.sources import ASSETS
from mdt_ray.evaluation.dinov2 import load_dinov2
from mdt_ray.evaluation.extractors import KINDS, image_size, load_extractor, transform, weights_hash
from mdt_ray.evaluation.inception import WEIGHTS_URL, Inception
from mdt_ray.evaluation.small import SmallFeatures, load_small_features
from tests.conftest import relative_error


def random_images(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception():
    torch.manual_seed(0)
    return Inception()


@pytest.fixture(scope="module")
def weights(tmp_path_factory, inception):
    """A small file or folder of random weights for each extractor, by name."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    save_file(SmallFeatures().state_dict(), folder / "digits.safetensors")
    torch.save(inception.state_dict(), folder / "inception.pth")
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)).save_pretrained(folder / "dinov2")
    small = str(folder / "digits.safetensors")
    return {"digits": small, "fashion": small, "inception": str(folder / "inception.pth"),
            "dinov2": str(folder / "dinov2")}


def digest(path):
    return storage.sha256(storage.read_bytes(str(path)))[:16]


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_small_ones_come_from_the_package_or_a_file(name, weights):
    images = random_images(2, 3, 32, 32)
    assert torch.equal(load_extractor(name)(images).pool, load_small_features(name)(images).pool)
    other = load_extractor(name, weights[name])
    assert torch.equal(other.state_dict()["pool.weight"], load_file(weights[name])["pool.weight"])
    assert not other.training
    assert weights_hash(name) == digest(ASSETS / name / "features.safetensors")
    assert weights_hash(name, weights[name]) == digest(weights[name]) != weights_hash(name)


def test_inception_comes_from_a_file(weights, inception):
    images = random_images(1, 3, 64, 64)
    found = load_extractor("inception", weights["inception"])
    assert relative_error(found(images).pool, inception(images).pool) < 1e-5
    assert weights_hash("inception", weights["inception"]) == digest(weights["inception"])


def test_dinov2_comes_from_a_folder(weights):
    images = random_images(1, 3, 64, 64)
    found = load_extractor("dinov2", weights["dinov2"])(images)
    assert torch.equal(found.pool, load_dinov2(weights["dinov2"])(images).pool)
    assert weights_hash("dinov2", weights["dinov2"]) == digest(f"{weights['dinov2']}/model.safetensors")


@pytest.mark.parametrize("name", KINDS)
def test_each_reads_the_images_it_says(name, weights):
    extractor = load_extractor(name, weights[name])
    assert extractor.name == name
    side = image_size(name)
    extractor(random_images(1, 3, side or 48, side or 48))
    other = random_images(1, 3, 40, 40)
    if side is None:
        extractor(other)
    else:
        with pytest.raises(ValueError, match=rf"\(B, 3, {side}, {side}\)"):
            extractor(other)


def test_sizes_and_transforms():
    assert {name: (image_size(name), transform(name)) for name in KINDS} == {
        "digits": (32, "as they are"), "fashion": (32, "as they are"), "inception": (None, "tf1-bilinear-299"),
        "dinov2": (None, "bicubic-antialias-224")}


def test_the_defaults_are_the_published_weights(tmp_path):
    """Empty caches and no network: the errors name what would have been taken, and how to come by it."""
    code = ("from mdt_ray.evaluation.extractors import load_extractor, weights_hash\n"
            "for name in ('inception', 'dinov2'):\n"
            "    for use in (load_extractor, weights_hash):\n"
            "        try:\n            use(name)\n"
            "        except ValueError as error:\n            print(error)")
    environment = {"TORCH_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, hashed, loaded_too, hashed_too = done.stdout.splitlines()
    assert loaded == hashed
    assert loaded.startswith(f"Inception weights: cannot read {tmp_path}/hub/checkpoints/weights-inception-2015-12-05")
    assert loaded.endswith(f" {WEIGHTS_URL}")
    assert loaded_too == hashed_too
    assert loaded_too.startswith("DINOv2 weights: neither a local folder nor on the hub: 'facebook/dinov2-large'")


@pytest.mark.parametrize(("name", "message"), [
    ("digits", "digits weights: cannot read .*; name no file to take the one in the package"),
    ("inception", "Inception weights: cannot read .*; fetch them with: mkdir"),
    ("dinov2", "DINOv2 weights: neither a local folder nor on the hub: .*; fetch facebook/dinov2-large"),
])
def test_missing_weights_name_the_remedy(name, message, tmp_path):
    for use in (load_extractor, weights_hash):
        with pytest.raises(ValueError, match=message):
            use(name, str(tmp_path / "none"))


def test_other_weights_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match=rf"digits weights: {weights['inception']}: no safetensors file of this network"):
        load_extractor("digits", weights["inception"])
    save_file({"pool.weight": torch.zeros(1)}, tmp_path / "file")
    with pytest.raises(ValueError, match=f"digits weights: {tmp_path}/file: no safetensors file of this network"):
        load_extractor("digits", str(tmp_path / "file"))
    for use in (load_extractor, weights_hash):
        with pytest.raises(ValueError, match=r"no file of torch\.save"):
            use("inception", weights["digits"])
        with pytest.raises(ValueError, match=r"has no config\.json and no model\.safetensors"):
            use("dinov2", str(tmp_path))


@pytest.mark.parametrize("use", [load_extractor, weights_hash, image_size, transform])
def test_an_unknown_name_is_met_with_the_nearest(use):
    with pytest.raises(ValueError, match=r"extractor = 'dino': no such extractor; did you mean 'dinov2'\?"):
        use("dino")
    with pytest.raises(ValueError, match="known: digits, dinov2, fashion, inception"):
        use("vgg")
