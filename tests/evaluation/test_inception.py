"""FID's Inception-v3: agreement with torch-fidelity's, its layers one by one, and how its weights are found and checked."""

import http.server
import io
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn

from mdt_ray import storage
from mdt_ray.evaluation.inception import WEIGHTS_URL, Inception, load_inception, resize_tf1
from tests.conftest import relative_error
from tests.helpers import NO_IMAGES

# From torch-fidelity 0.4.0's FeatureExtractorInceptionV3 (CPU, torch 2.13) with the weights of `filled_weights` and the
# image of `oracle_image`. Pool: the first five; spatial: five that ReLU let through; logits: the first five.
POOL = [0.1486233, 33.46345, 0.2974131, 6.892864, 2.423039]
SPATIAL_AT, SPATIAL = [2, 3, 4, 9, 10], [2.796587, 2.825905, 0.2842169, 2.012776, 2.74369]
LOGITS = [1.868051, -17.8586, 0.1592841, 13.72362, 16.25253]
LARGEST = (59.0244, 19.6242, 36.4071)  # of each kind, over the whole vector: errors are relative to it


def filled_weights(network):
    """Weights that keep activations finite and alive; uniform, because those draws are the same bits everywhere."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items() if "num_batches" not in name}
    filled = {}
    for seed, name in enumerate(sorted(shapes)):
        u = torch.rand(shapes[name], generator=torch.Generator().manual_seed(seed)) * 2 - 1
        if name.endswith("conv.weight"):
            filled[name] = u * (6 / shapes[name][1:].numel()) ** 0.5
        elif name == "fc.weight":
            filled[name] = u * (3 / shapes[name][1]) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            filled[name] = 1 + u / 2
        else:
            filled[name] = u / 4
    return filled


def random_images(*shape, seed):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def oracle_image():
    return random_images(1, 3, 256, 256, seed=1)


@pytest.fixture(scope="module")
def network():
    fresh = Inception()
    return Inception(filled_weights(fresh))


@pytest.fixture(scope="module")
def images():
    return random_images(3, 3, 64, 80, seed=2)


@pytest.fixture(scope="module")
def features(network, images):
    return network(images)


@pytest.fixture(scope="module")
def small_file(network):
    """A valid state dict in few bytes: each tensor is one number, expanded; key number i holds (i + 1) / 1000."""
    state = {name: torch.tensor((i + 1) / 1000).expand(tensor.shape)
             for i, (name, tensor) in enumerate(network.state_dict().items()) if "num_batches" not in name}
    return saved(state)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def named(data):
    return f"weights-{storage.sha256(data)[:8]}.pth"


# The network.

def test_agrees_with_torch_fidelity(network):
    pool, spatial, logits = network(oracle_image())
    for found, expected, largest in ((pool[0, :5], POOL, LARGEST[0]), (spatial[0, SPATIAL_AT], SPATIAL, LARGEST[1]),
                                     (logits[0, :5], LOGITS, LARGEST[2])):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4 * largest)
    assert [f.abs().max().item() for f in (pool, spatial, logits)] == pytest.approx(LARGEST, rel=1e-4)


def test_shapes_and_dtypes(features):
    assert features.pool.shape == (3, 2048)
    assert features.spatial.shape == (3, 2023)
    assert features.logits.shape == (3, 1008)
    assert {f.dtype for f in features} == {torch.float32}
    assert all(f.is_contiguous() and f.isfinite().all() and f.std() > 0.1 for f in features)


def test_state_dict_is_the_published_one(network):
    state = network.state_dict()
    keys = [name for name in state if not name.endswith("num_batches_tracked")]
    # Five in the stem; A 7 (three times), B 4, C 10 (four times), D 6, E 9 (twice).
    num_convs = 5 + 3 * 7 + 4 + 4 * 10 + 6 + 2 * 9
    assert num_convs == sum(name.endswith("conv.weight") for name in keys) == 94
    assert len(keys) == 94 * 5 + 2
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    assert sum(state[name].numel() for name in keys) == 23_885_392  # with the running means and variances
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_1a_3x3.bn.running_var": (32,),
        "Conv2d_3b_1x1.conv.weight": (80, 64, 1, 1), "Conv2d_4a_3x3.bn.bias": (192,),
        "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1), "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5c.branch5x5_2.conv.weight": (64, 48, 5, 5), "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3), "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7), "Mixed_6d.branch7x7_3.conv.weight": (192, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_4.conv.weight": (192, 192, 7, 1), "Mixed_6e.branch7x7dbl_5.bn.weight": (192,),
        "Mixed_7a.branch3x3_2.conv.weight": (320, 192, 3, 3), "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3dbl_1.conv.weight": (448, 1280, 1, 1), "Mixed_7c.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1), "Mixed_7c.branch_pool.bn.running_mean": (192,),
        "fc.weight": (1008, 2048), "fc.bias": (1008,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


def test_features_do_not_depend_on_the_batch(network, images, features):
    for i in range(3):
        for alone, whole in zip(network(images[i:i + 1]), features, strict=True):
            assert relative_error(alone[0], whole[i]) < 1e-4


def pooled_by_hand(x, stride, padding, reduce):
    """3x3 windows clipped to the image, one by one: x (C, H, W) -> (C, H', W')."""
    size = (x.shape[1] + 2 * padding - 3) // stride + 1
    out = np.empty((x.shape[0], size, size), dtype=np.float32)
    for row in range(size):
        for column in range(size):
            top, left = row * stride - padding, column * stride - padding
            out[:, row, column] = reduce(x[:, max(top, 0):top + 3, max(left, 0):left + 3], axis=(1, 2))
    return out


@pytest.mark.parametrize(("name", "channels", "reduce"), [
    ("Mixed_5b", 192, np.mean), ("Mixed_5c", 256, np.mean), ("Mixed_5d", 288, np.mean), ("Mixed_6b", 768, np.mean),
    ("Mixed_6c", 768, np.mean), ("Mixed_6d", 768, np.mean), ("Mixed_6e", 768, np.mean), ("Mixed_7b", 1280, np.mean),
    ("Mixed_7c", 2048, np.max),
])
def test_pooling_branch_averages_without_padding_and_takes_the_maximum_in_7c(network, name, channels, reduce):
    x = torch.rand((1, channels, 5, 5), generator=torch.Generator().manual_seed(3))
    block = network.get_submodule(name)
    expected = block.branch_pool(torch.from_numpy(pooled_by_hand(x[0].numpy(), 1, 1, reduce))[None])
    assert relative_error(block(x)[:, -expected.shape[1]:], expected) < 1e-5


@pytest.mark.parametrize(("name", "channels"), [("Mixed_6a", 288), ("Mixed_7a", 768)])
def test_halving_blocks_pass_the_maximum_on(network, name, channels):
    x = torch.rand((1, channels, 7, 7), generator=torch.Generator().manual_seed(4))
    expected = torch.from_numpy(pooled_by_hand(x[0].numpy(), 2, 0, np.max))[None]
    assert torch.equal(network.get_submodule(name)(x)[:, -channels:], expected)


def test_logits_have_no_bias(network, features):
    assert network.fc.bias.abs().max() > 0.2
    assert relative_error(features.logits, features.pool @ network.fc.weight.T) < 1e-5


def test_pool_and_spatial_are_taken_from_where_they_should(network, images):
    maps, precisions = {}, set()

    def keep(name):
        def hook(_module, _inputs, output):
            maps[name] = output.numpy().copy()
            precisions.add(torch.backends.cudnn.conv.fp32_precision)
        return hook

    before = torch.backends.cudnn.conv.fp32_precision
    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in ("Mixed_6d.branch1x1", "Mixed_7c")]
    found = network(images)
    for handle in handles:
        handle.remove()
    branch = maps["Mixed_6d.branch1x1"]
    assert branch.shape == (3, 192, 17, 17)
    by_hand = [branch[1, channel, row, column] for row in range(17) for column in range(17) for channel in range(7)]
    np.testing.assert_array_equal(found.spatial[1].numpy(), by_hand)
    assert maps["Mixed_7c"].shape == (3, 2048, 8, 8)
    np.testing.assert_allclose(found.pool.numpy(), maps["Mixed_7c"].mean((2, 3)), rtol=1e-5, atol=1e-6)
    assert precisions == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_is_frozen_and_named(network, images, features):
    assert network.name == "inception"
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    holder = nn.ModuleList([network]).train()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        again = holder[0](images)
    for one, other in zip(again, features, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


@pytest.mark.parametrize(("images", "message"), NO_IMAGES)
def test_refuses_other_inputs(network, images, message):
    with pytest.raises(ValueError, match=message):
        network(images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(network, images, features):
    """TF32 would not: it has 10 bits of mantissa."""
    on_gpu = Inception(network.state_dict()).to("cuda")
    for one, other in zip(on_gpu(images), features, strict=True):
        assert relative_error(one.cpu(), other) < 1e-4


# The resize.

def resized_by_hand(image, size):
    """TensorFlow 1's kernel, pixel by pixel, in float32: image (H, W) -> (size, size)."""
    height, width = image.shape
    out = np.empty((size, size), dtype=np.float32)
    for row in range(size):
        y = np.float32(row) * (np.float32(height) / np.float32(size))
        top = math.floor(y)
        bottom, dy = min(top + 1, height - 1), y - np.float32(top)
        for column in range(size):
            x = np.float32(column) * (np.float32(width) / np.float32(size))
            left = math.floor(x)
            right, dx = min(left + 1, width - 1), x - np.float32(left)
            upper = image[top, left] + (image[top, right] - image[top, left]) * dx
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            out[row, column] = upper + (lower - upper) * dy
    return out


@pytest.mark.parametrize(("height", "width", "size"),
                         [(4, 4, 9), (9, 7, 4), (1, 3, 5), (6, 6, 6), (32, 32, 29), (50, 31, 30)])
def test_resize_is_tensorflows_to_the_bit(height, width, size):
    x = random_images(2, 3, height, width, seed=5).float()
    found = resize_tf1(x, size)
    assert found.shape == (2, 3, size, size)
    np.testing.assert_array_equal(found[1, 2].numpy(), resized_by_hand(x[1, 2].numpy(), size))


@pytest.mark.parametrize("side", [32, 256, 300])
def test_resize_to_the_networks_size(side):
    x = random_images(1, 1, side, side, seed=6).float()
    np.testing.assert_array_equal(resize_tf1(x, 299)[0, 0].numpy(), resized_by_hand(x[0, 0].numpy(), 299))


def test_resize_to_the_same_size_changes_nothing():
    x = random_images(1, 3, 299, 299, seed=7).float()
    assert torch.equal(resize_tf1(x, 299), x)


# Loading.

def changed(state, **changes):
    """A copy with entries replaced, or dropped where None; `__` stands for a dot."""
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(("changes", "message"), [
    ({"fc__bias": None}, r"1 keys missing \(first: fc.bias\)"),
    ({"AuxLogits__fc__bias": torch.zeros(1)}, r"1 keys unexpected \(first: AuxLogits.fc.bias\)"),
    ({"fc__num_batches_tracked": torch.tensor(0)}, r"1 keys unexpected \(first: fc.num_batches_tracked\)"),
    ({"fc__bias": torch.zeros(1000)}, r"1 keys of another shape \(first: fc.bias \(1000,\) for \(1008,\)\)"),
    ({"fc__bias": None, "bias": torch.zeros(1)}, r"fc.bias\); 1 keys unexpected \(first: bias\)"),
])
def test_state_dict_is_taken_whole_or_refused(network, changes, message):
    with pytest.raises(ValueError, match=message):
        Inception(changed(network.state_dict(), **changes))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch.hub's; the folder itself is not there yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "torch home" / "hub" / "checkpoints"


def names_in(folder):
    return sorted(f.name for f in folder.iterdir()) if folder.exists() else []


def check_small_file_is_loaded(network):
    for i, (name, tensor) in enumerate(network.state_dict().items()):
        assert "num_batches" in name or (tensor == torch.tensor((i + 1) / 1000)).all(), name


def test_loads_a_path_a_uri_and_the_cache(network, small_file, tmp_path, cache):
    path = tmp_path / "my weights.pth"
    path.write_bytes(small_file)
    check_small_file_is_loaded(load_inception(path, sha256=storage.sha256(small_file)))
    check_small_file_is_loaded(load_inception(path.as_uri()))
    assert names_in(cache) == []
    with_counters = saved({name: tensor.new_zeros(()).expand(tensor.shape)
                           for name, tensor in network.state_dict().items()})
    path.write_bytes(with_counters)
    assert load_inception(str(path)).fc.weight.abs().max() == 0


def test_no_weights_given_means_the_cached_ones(small_file, cache, monkeypatch):
    """With the published file's checksum out of reach, the name stands in for one of the same form."""
    url = f"https://example.invalid/{named(small_file)}"
    monkeypatch.setattr("mdt_ray.evaluation.inception.WEIGHTS_URL", url)
    with pytest.raises(ValueError, match="cannot read") as error:
        load_inception()
    assert f"curl -L -o '{cache / named(small_file)}' {url}" in str(error.value)
    cache.mkdir(parents=True)
    (cache / named(small_file)).write_bytes(small_file)
    check_small_file_is_loaded(load_inception())


def test_a_missing_file_names_the_command_that_fetches_it(tmp_path, cache):
    path = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match="cannot read") as error:
        load_inception(path)
    assert f"curl -L -o {path} {WEIGHTS_URL}" in str(error.value)
    assert WEIGHTS_URL == ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                           "weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(ValueError, match="cannot read"):
        load_inception(tmp_path)  # a folder
    with pytest.raises(ValueError, match="cannot open"):
        load_inception("nowhere://weights.pth")
    with pytest.raises(ValueError, match=r"curl -L -o .*, and copy that file to mock:///a/b\.pth$"):
        load_inception("mock:///a/b.pth")  # Arrow's store in memory


def test_a_wrong_checksum_names_file_expected_and_found(small_file, tmp_path):
    path, found = tmp_path / "weights-6726825d.pth", storage.sha256(small_file)
    path.write_bytes(small_file)
    with pytest.raises(ValueError, match=rf"{path} has sha256 {found}, but it must .* 6726825d;"):
        load_inception(path)
    with pytest.raises(ValueError, match=rf"{path} has sha256 {found}, but it must .* {'0' * 64};"):
        load_inception(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="64 lower-case hex digits, got '6726825d'"):
        load_inception(path, sha256="6726825d")
    check_small_file_is_loaded(load_inception(path, sha256=found))  # the checksum given outranks the name


@pytest.mark.parametrize(("data", "message"), [
    (b"", "no file of torch.save"), (b"<html>Not found</html>", "no file of torch.save"),
    (b"\x80\x02\xff", "no file of torch.save"), (b"0", "no file of torch.save"),
    (saved({"a": torch.zeros(9)})[:-40], "no file of torch.save"), (saved([torch.zeros(1)]), "no state dict of tensors"),
    (saved({"state_dict": {"fc.bias": torch.zeros(1008)}}), "no state dict of tensors"),
    (saved({"fc.bias": torch.zeros(1008)}), "not that of the 2015-12-05 Inception-v3"),
])
def test_a_file_without_such_weights_is_refused(data, message, tmp_path):
    (tmp_path / "weights.pth").write_bytes(data)
    with pytest.raises(ValueError, match=rf"{tmp_path}/weights.pth: .*{message}"):
        load_inception(tmp_path / "weights.pth")


@pytest.fixture
def server():
    """Files by path from 127.0.0.1; `length` announces more bytes than are sent. Yields (address, files, requests)."""
    files, requests = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            data, length = files.get(self.path.partition("?")[0], (None, 0))
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_):
            pass

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", files, requests
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_url_is_downloaded_once(small_file, cache, server):
    address, files, requests = server
    name = named(small_file)
    files[f"/a/{name}"] = (small_file, len(small_file))
    for _ in range(2):
        check_small_file_is_loaded(load_inception(f"{address}/a/{name}?download=1"))
    assert requests == [f"/a/{name}?download=1"]
    assert names_in(cache) == [name]
    (cache / name).write_bytes(b"damaged later")
    with pytest.raises(ValueError, match=f"{cache / name} has sha256 .* delete it and fetch it"):
        load_inception(f"{address}/a/{name}")


def test_a_failed_download_leaves_nothing_behind(small_file, cache, server):
    address, files, _ = server
    name, size = named(small_file), len(small_file)
    files["/short/" + name] = (small_file[:size // 2], size)  # the connection ends early
    files["/corrupt/" + name] = (small_file[:-1] + b"?", size)
    files["/" + name] = (small_file, size)
    files["/other.pth"] = (b"not weights", 11)
    for path, sha256, message in [("/short/" + name, None, "cannot read .*IncompleteRead"),
                                  ("/corrupt/" + name, None, f"{address}/corrupt/{name} has sha256 .* {name[8:16]};"),
                                  ("/" + name, "0" * 64, f"has sha256 .* {'0' * 64};"),
                                  ("/gone/" + name, None, "cannot read .*404"),
                                  ("/other.pth", None, "no file of torch.save")]:
        with pytest.raises(ValueError, match=message):
            load_inception(address + path, sha256=sha256)
        assert names_in(cache) == []
    address = "http://127.0.0.1:1"  # nobody listens
    with pytest.raises(ValueError, match=f"curl -L -o '{cache / name}' {address}/{name}"):
        load_inception(f"{address}/{name}")
