"""FD-DINOv2's network: loading a small one as transformers writes it, its features, the resize, the position grid."""

import json
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from mdt_ray import storage
from mdt_ray.evaluation.dinov2 import Dinov2, find_dinov2, hash_dinov2, load_dinov2, resize_positions
from tests.conftest import relative_error
from tests.helpers import NO_IMAGES


def random_images(*shape, seed):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def small_network(image_size):
    """Two layers, width 32; larger initial weights than usual, so that every part moves the features."""
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2,
                                    image_size=image_size, initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A position grid of 5x5, so that it has to be resized, as the published one of 37x37."""
    folder = tmp_path_factory.mktemp("dinov2")
    small_network(70).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def network(folder):
    return load_dinov2(folder)


# The features.

def test_pool_is_the_class_token_after_the_last_norm(tmp_path):
    """At a grid of 16x16 there is nothing to resize, and transformers' own forward is the oracle."""
    own = small_network(224)
    own.save_pretrained(tmp_path)
    images = random_images(3, 3, 224, 224, seed=1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images.permute(0, 2, 3, 1) / 255 - mean) / std  # (3, 224, 224, 3)
    with torch.no_grad():
        expected = own(pixels.permute(0, 3, 1, 2)).last_hidden_state[:, 0]
    found = load_dinov2(tmp_path)(images)
    assert found.pool.shape == (3, 32)
    assert found.pool.dtype == torch.float32
    assert relative_error(found.pool, expected) < 1e-5
    assert relative_error(found.pool[:1], expected[1:2]) > 1e-3  # images differ
    assert (found.spatial, found.logits) == (None, None)
    assert found.pool.mean(1).abs().max() < 1e-5  # of a norm whose scale is 1 and shift 0
    torch.testing.assert_close(found.pool.std(1, correction=0), torch.ones(3), rtol=0, atol=1e-3)


def test_features_do_not_depend_on_the_batch(network):
    images = random_images(3, 3, 40, 56, seed=2)
    whole = network(images).pool
    for i in range(3):
        assert relative_error(network(images[i:i + 1]).pool[0], whole[i]) < 1e-4


def test_is_frozen_named_and_of_full_precision(network):
    images = random_images(2, 3, 32, 32, seed=3)
    once = network(images).pool
    precisions = set()

    def keep(*_):
        precisions.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))

    handle = network.network.layernorm.register_forward_hook(keep)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            again = network.train()(images).pool
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
        handle.remove()
    assert precisions == {("ieee", "ieee")}
    assert torch.equal(once, again)
    assert not again.requires_grad
    assert network.name == "dinov2"
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(("images", "message"), NO_IMAGES)
def test_refuses_other_inputs(network, images, message):
    with pytest.raises(ValueError, match=message):
        network(images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(folder, network):
    images = random_images(4, 3, 64, 64, seed=4)
    assert relative_error(load_dinov2(folder, "cuda")(images).pool.cpu(), network(images).pool) < 1e-4


# The resizes.

def cubic(x, a):
    """Keys' cubic kernel, between -2 and 2."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def antialiased_weights(length, size):
    """(size, length): a cubic filter (a = -0.5) stretched over the pixels that one new pixel covers, cut at the edges."""
    scale = length / size
    stretch = max(scale, 1.0)
    rows = np.array([[cubic((pixel + 0.5 - (new + 0.5) * scale) / stretch, -0.5) for pixel in range(length)]
                     for new in range(size)])
    return rows / rows.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (256, 256), (300, 100), (224, 224), (1, 3)])
def test_images_are_resized_with_antialiasing_and_normalised(network, height, width):
    images = random_images(2, 3, height, width, seed=5)
    resized = antialiased_weights(height, 224) @ images.double().numpy() @ antialiased_weights(width, 224).T
    expected = (resized / 255 - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    found = network.prepare(images)
    assert found.shape == (2, 3, 224, 224)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def interpolating_weights(length, size, offset):
    """(size, length): cubic (a = -0.75) between the four nearest points, the edge repeated; the published network's."""
    rows = np.zeros((size, length))
    for new in range(size):
        at = (new + 0.5) * length / (size + offset) - 0.5
        for point in range(math.floor(at) - 1, math.floor(at) + 3):
            rows[new, min(max(point, 0), length - 1)] += cubic(at - point, -0.75)
    return rows


@pytest.mark.parametrize("size", [5, 37])
def test_positions_are_resized_as_the_published_network_does(size):
    embeddings = torch.rand((1, 1 + size * size, 3), generator=torch.Generator().manual_seed(6))
    grid = embeddings[0, 1:].reshape(size, size, 3).permute(2, 0, 1).double().numpy()  # (D, M, M)
    weights = interpolating_weights(size, 16, 0.1)
    found = resize_positions(embeddings, 16)
    assert torch.equal(found[:, 0], embeddings[:, 0])
    expected = (weights @ grid @ weights.T).transpose(1, 2, 0).reshape(256, 3)
    np.testing.assert_allclose(found[0, 1:].numpy(), expected, atol=1e-5)


def test_a_grid_of_the_right_size_stays():
    embeddings = torch.rand(1, 257, 3)
    assert torch.equal(resize_positions(embeddings, 16), embeddings)


def test_the_resized_grid_is_what_the_network_adds(folder, network):
    """Without it, transformers would resize in its own way: the features differ, though not by much."""
    saved = load_file(folder / "model.safetensors")["embeddings.position_embeddings"]
    assert torch.equal(network.network.embeddings.position_embeddings, resize_positions(saved, 16))
    images = random_images(2, 3, 224, 224, seed=7)
    with torch.no_grad():
        theirs = Dinov2Model.from_pretrained(folder)(network.prepare(images)).last_hidden_state[:, 0]
    assert 1e-4 < relative_error(network(images).pool, theirs) < 0.5


# Loading.

def copied(folder, target, config=None, **changes):
    """A copy of the folder with entries of its config and its tensors replaced, or dropped where None."""
    target.mkdir()
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    (target / "config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(("config", "changes", "message"), [
    ({}, {"layernorm__bias": None}, r"1 missing keys \(first: layernorm.bias\)"),
    ({}, {"extra": torch.zeros(1)}, r"1 unexpected keys \(first: extra\)"),
    ({}, {"layernorm__bias": torch.zeros(5)}, "not those of its config.json"),
    ({"num_hidden_layers": 3}, {}, r"\d+ missing keys \(first: encoder.layer.2"),
    ({"model_type": "vit"}, {}, r"\('vit', 14\), but they must be \('dinov2', 14\)"),
    ({"patch_size": 16}, {}, r"\('dinov2', 16\), but they must be \('dinov2', 14\)"),
])
def test_weights_are_taken_whole_or_refused(folder, tmp_path, config, changes, message):
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{message}.*take facebook/dinov2-large"):
        load_dinov2(copied(folder, tmp_path / "copy", config, **changes))


def test_a_damaged_file_is_refused(folder, tmp_path):
    copy = copied(folder, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"<html>Not found</html>")
    with pytest.raises(ValueError, match=f"{copy}: not those of its config.json"):
        load_dinov2(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"{copy}/config.json: damaged JSON"):
        load_dinov2(copy)


def test_pickled_weights_are_never_opened(folder, tmp_path):
    copy = copied(folder, tmp_path / "copy")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{copy} has no model.safetensors; copy the config.json and model.safetensors of"):
        load_dinov2(copy)


@pytest.mark.parametrize("weights", ["/nowhere/dinov2", "a/b/c", "s3://bucket/folder", "./nowhere"])
def test_weights_that_are_nowhere(weights):
    for use in (load_dinov2, find_dinov2, hash_dinov2):
        with pytest.raises(ValueError, match=rf"neither a local folder nor on the hub: '{weights}' .*; fetch facebook"):
            use(weights)


def test_another_size_than_large_is_said(folder, caplog):
    with caplog.at_level(logging.WARNING):
        load_dinov2(str(folder))
    assert [r.message for r in caplog.records if r.name.startswith("mdt_ray")] == [
        f"DINOv2 weights: {folder} is not ViT-L/14: its numbers are not those of published FD-DINOv2"]


def test_the_hash_is_that_of_the_file(folder):
    assert hash_dinov2(folder) == storage.sha256((folder / "model.safetensors").read_bytes())


def in_a_process(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_hub_id_with_and_without_a_revision(folder, tmp_path):
    """From the hub's cache as its client leaves it, without network."""
    repository = tmp_path / "models--user--pictures"
    for commit, scale in (("a" * 40, 1.0), ("b" * 40, 2.0)):
        (repository / "snapshots").mkdir(parents=True, exist_ok=True)
        copied(folder, repository / "snapshots" / commit, layernorm__weight=torch.full((32,), scale))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    code = ("from mdt_ray.evaluation.dinov2 import find_dinov2, hash_dinov2, load_dinov2\n"
            f"for weights in ('user/pictures', 'user/pictures@{'a' * 40}'):\n"
            "    print(find_dinov2(weights).name, hash_dinov2(weights),"
            " load_dinov2(weights).network.layernorm.weight[0].item())\n"
            "for weights in ('user/other', 'user/pictures@v1'):\n"
            "    try:\n        load_dinov2(weights)\n"
            "    except ValueError as error:\n        print(error)")
    newest, pinned, *errors = in_a_process(code, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert newest.split()[::2] == ["b" * 40, "2.0"]
    assert pinned.split()[::2] == ["a" * 40, "1.0"]
    assert newest.split()[1] != pinned.split()[1]
    assert len(errors) == 2
    assert "nor on the hub: 'user/other'" in errors[0]
    assert "nor on the hub: 'user/pictures@v1'" in errors[1]


def test_without_transformers_the_extra_is_named(folder):
    code = ("import sys\nsys.modules['transformers'] = None  # what makes its import fail\n"
            "from mdt_ray.evaluation.dinov2 import hash_dinov2, load_dinov2\n"
            f"print(hash_dinov2({str(folder)!r}))\n"
            f"try:\n    load_dinov2({str(folder)!r})\nexcept ValueError as error:\n    print(error)")
    digest, error = in_a_process(code)
    assert digest == hash_dinov2(folder)
    assert error == ('extractor = "dinov2": needs the package transformers; '
                     'install it with: pip install "mdt-ray[dinov2]"')


def test_fits_the_published_sizes():
    """The published checkpoint's sizes, with random weights on no device: names and shapes fit."""
    with torch.device("meta"):
        large = Dinov2Model(Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518))
    assert large.embeddings.position_embeddings.shape == (1, 1 + 37 * 37, 1024)
    wrapped = Dinov2(large)
    assert wrapped.network.embeddings.position_embeddings.shape == (1, 257, 1024)
    assert 300e6 < sum(p.numel() for p in wrapped.parameters()) < 310e6
